"""Script of the page of `potstill inspect --html`: shades tokens, moves between them, fills the panel.

Text reaches the page by textContent alone. Where one is (row, token, quantity) stands behind the # of the address.
"""

SCRIPT = r"""
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const $ = id => document.getElementById(id);
const text = $('text'), panel = $('panel'), rowChoice = $('row'), quantityChoice = $('quantity');
const minor = ['text', 'entries', 'targets take'];  // left out on a small screen
let row = null, quantity = null, chosen = null, tokens = [], found = new Map(), masked = new Set();

function make(tag, name, content) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (content !== undefined) node.textContent = content;
  return node;
}
// Signs for what cannot be seen, or would turn the text about.
function visible(character) {
  const code = character.codePointAt(0);
  if (character === '\n') return '\u21b5';
  if (character === '\t') return '\u21e5';
  if (character === '\r') return '\u240d';
  if (code < 32) return String.fromCharCode(0x2400 + code);
  if (code === 127) return '\u2421';
  const hidden = (code >= 128 && code < 160) || [0xad, 0x200b, 0x200e, 0x200f, 0x2028, 0x2029, 0xfeff].includes(code)
    || (code >= 0x202a && code <= 0x202e) || (code >= 0x2060 && code <= 0x2069);
  return hidden ? '\u27e8' + code.toString(16).toUpperCase().padStart(4, '0') + '\u27e9' : null;
}
function fill(node, content, whole) {
  let plain = '';
  const flush = () => { if (plain) node.append(plain); plain = ''; };
  for (const character of content) {
    const sign = visible(character) || (whole && character === ' ' ? '\u2423' : null);
    if (sign === null) { plain += character; continue; }
    flush();
    node.append(make('span', 'sign', sign));
    if (character === '\n' && !whole) node.append('\n');
  }
  flush();
}
function known(value) { return value !== null && value !== undefined; }
function number(value, unit) {
  if (!known(value)) return '\u2013';
  if (unit === '%') return percent(value / 100);
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(Math.abs(value) >= 10 ? 1 : 2);
}
function percent(share) {
  const value = 100 * share;
  if (value > 0 && value < 0.01) return '<0.01\u00a0%';
  return value.toFixed(value >= 10 ? 1 : 2) + '\u00a0%';
}
function rankText(rank) { return rank >= 255 ? '255 or more' : String(rank); }
function shareOf(one, value) {  // 0 to 1, or -1 to 1 where there are two signs
  if (one.scale === 'rank') return Math.log1p(value) / Math.log(256);
  return Math.max(-1, Math.min(1, value / one.top));
}
function shade(share, one) {
  if (one.scale === 'weight')  // what is kept stands out by its ink too, see ink()
    return share > 0 ? `color-mix(in oklab, var(--cold) ${(12 + 30 * share).toFixed(0)}%, transparent)` : '';
  const strength = (Math.abs(share) * 92).toFixed(0);
  return strength === '0' ? '' : `color-mix(in oklab, var(--${share < 0 ? 'cold' : 'warm'}) ${strength}%, transparent)`;
}
function ink(share, one) {
  return one.scale === 'weight' ? `color-mix(in oklab, var(--ink) ${(100 * share).toFixed(0)}%, var(--soft))` : '';
}
function legend() {
  const ramp = document.querySelector('.ramp'), ticks = document.querySelector('.ticks');
  const signed = quantity.scale === 'signed', steps = [];
  for (let n = 0; n <= 10; n++) steps.push(shade(signed ? n / 5 - 1 : n / 10, quantity) || 'transparent');
  ramp.style.background = `linear-gradient(to right, ${steps.join(', ')})`;
  let marks;
  const top = number(quantity.top, '') + (quantity.unit ? ' ' + quantity.unit : '');
  const ranks = [0, 1, 3, 10, 40, 255];
  if (quantity.scale === 'rank') marks = ranks.map(rank => [shareOf(quantity, rank), rank === 255 ? '255+' : rank]);
  else if (signed) marks = [[0, '\u2264 \u2212' + number(quantity.top, '')], [.5, '0'], [1, '\u2265 ' + top]];
  else if (quantity.scale === 'weight')
    marks = [[0, '0: left out'], [1, quantity.top > 1 ? number(quantity.top, '') : '1: trained on']];
  else marks = [[0, '0'], [.5, number(quantity.top / 2, '')], [1, '\u2265 ' + top]];
  ticks.replaceChildren(...marks.map(([share, label]) => {
    const mark = make('span', '', label);
    mark.style.left = 100 * share + '%';
    return mark;
  }));
  quantityChoice.title = quantity.about;
}
function paint() {
  const values = row.values[quantity.key] || [];
  tokens.forEach((node, n) => {
    const value = values[n];
    node.style.background = known(value) ? shade(shareOf(quantity, value), quantity) : '';
    node.style.color = known(value) ? ink(shareOf(quantity, value), quantity) : '';
  });
  legend();
}
function showRow(wanted) {
  row = data.rows[wanted];
  chosen = null;
  rowChoice.value = wanted;
  $('previous').disabled = wanted === 0;
  $('next').disabled = wanted === data.rows.length - 1;
  const special = new Set(row.special), nodes = [];
  masked = new Set(row.masked);
  found = new Map((row.candidates ? row.candidates.at : []).map((token, place) => [token, place]));
  tokens = [];
  text.className = data.as_text ? '' : 'ids';
  row.docs.forEach((size, number) => {
    nodes.push(make('div', 'doc', `document ${number + 1} of ${row.docs.length} \u00b7 ${size} tokens`));
    for (let n = 0; n < size; n++) {
      const place = tokens.length, node = make('span', 't');
      node.dataset.n = place;
      if (row.text[place] === '') { node.textContent = '\u00b7'; node.classList.add('part'); }
      else {
        // A shaded space would hang over the end of a line: it stands before the token, unshaded.
        const lead = row.text[place].match(/^ */)[0];
        if (lead && lead !== row.text[place]) nodes.push(lead);
        fill(node, lead === row.text[place] ? lead : row.text[place].slice(lead.length), false);
      }
      if (special.has(place)) node.classList.add('special');
      if (!row.predicted[place]) node.classList.add('none');
      if (masked.has(place)) node.classList.add('masked');
      tokens.push(node);
      nodes.push(node);
    }
  });
  text.replaceChildren(...nodes);
  const summary = row.figures.map(([name, value]) => {
    const part = make('span', minor.includes(name) ? 'minor' : '', name + ' ');
    part.append(make('b', '', value));
    return part;
  });
  $('summary').replaceChildren(...summary);
  $('masks').hidden = masked.size === 0;
  $('note').textContent = row.note;
  $('note').className = row.left_out ? 'out' : '';
  paint();
  showToken(null);
}
function docOf(place) {
  let first = 0;
  for (let number = 0; number < row.docs.length; number++) {
    if (place < first + row.docs[number]) return [number, place - first, row.docs[number]];
    first += row.docs[number];
  }
}
function candidate(mark, name, share, full, cumulated, style) {
  const line = make('div', 'c ' + style), meter = make('span', 'meter'), inner = make('i');
  const label = make('span', 'name');
  if (style === '' || style === 'true') fill(label, name, true); else label.textContent = name;
  label.title = label.textContent;
  inner.style.width = Math.min(100, 100 * share / full) + '%';
  meter.append(inner);
  line.append(make('span', '', mark), label, meter, make('span', '', percent(share)),
    make('span', '', cumulated === null ? '' : percent(Math.min(1, cumulated))));
  return line;
}
function whereKept(place, rank) {  // what the list does not show of the true token
  const where = found.get(place);
  if (where === undefined) return null;
  const listed = row.candidates.ids[where], kept = row.kept[place];
  if (listed.includes(row.ids[place])) return null;
  if (kept === listed.length || (known(rank) && rank >= kept && row.candidates.unit === 'p'))
    return 'not kept: in the tail';
  if (known(rank) && row.candidates.unit === 'p') return 'kept, behind the entries listed here';
  return 'not among those listed here';
}
function truth(place) {
  const [, inside, size] = docOf(place), said = [];
  const end = inside === size - 1 ? ' Its document ends here: this position has no target.' : '';
  if (inside === 0) return 'The first token of its document: no position before it has it as its target.' + end;
  if (masked.has(place)) return 'Not trained on: the mask of its row leaves it out, so it is no target.' + end;
  if (!row.predicted[place]) return 'No target is stored for it: the teacher was refused here.' + end;
  const loss = (row.values.t_loss || [])[place], rank = (row.values.t_rank || [])[place];
  if (rank === 0) said.push('the teacher\u2019s first choice');
  else if (known(rank)) said.push('rank ' + rankText(rank) + ' of the teacher');
  if (known(loss)) said.push(('p\u00a0=\u00a0' + percent(Math.exp(-loss))).replace('=\u00a0<', '<\u00a0'));
  const place_ = whereKept(place, rank);
  if (place_) said.push(place_);
  return (said.length ? 'True token: ' + said.join(', ') + '.' : '') + end;
}
function candidates(place) {
  const where = found.get(place);
  if (where === undefined) return [];
  const { ids, p, rest, unit } = row.candidates, lines = [];
  const full = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5].find(end => (p[where][0] || 0) <= end) || 1;
  const words = ['', `${row.kept[place]} kept entries`, `to ${100 * full} %`, unit === 'p' ? 'p' : 'share', 'sum'];
  const head = make('div', 'c head');
  head.append(...words.map(word => make('span', '', word)));
  head.title = `${unit}; a full bar is ${100 * full} %`;
  lines.push(head);
  let sum = 0;
  ids[where].forEach((id, n) => {
    sum += p[where][n];
    const right = id === row.ids[place];
    lines.push(candidate(String(n), data.names[id], p[where][n], full, sum, right ? 'true' : ''));
  });
  const more = row.kept[place] - ids[where].length;
  if (more > 0) {
    sum += rest[where];
    lines.push(candidate('', `${more} more kept entries`, rest[where], full, sum, 'rest'));
  }
  const tail = (row.values.t_tail || [])[place];
  if (known(tail)) lines.push(candidate('', 'tail: all others', tail / 100, full, null, 'rest'));
  return lines;
}
function valueText(one, place, nats) {
  const value = place === null ? null : (row.values[one.key] || [])[place];
  if (!known(value)) return '\u2013';
  if (one.scale === 'rank') return value >= 255 ? '255+' : String(value);
  if (one.scale === 'weight') return value.toFixed(2);
  return one.unit === 'nats' ? value.toFixed(2) + nats : number(value, one.unit);
}
function facts(place) {  // a line for each figure, a column for each model; then the weights
  const models = data.quantities.filter(one => one.source !== 'kept');
  const sources = [...new Set(models.map(one => one.source))];
  const cell = one => {
    const node = make('td', one === quantity ? 'now' : '', one ? valueText(one, place, '') : '');
    if (one) node.title = one.label + '. ' + one.about;
    return node;
  };
  const line = (name, cells) => { const node = make('tr'); node.append(make('td', '', name), ...cells); return node; };
  const lines = data.short.map(short => [short, models.filter(one => one.short === short)])
    .filter(([, found]) => found.length)
    .map(([short, found]) => line(short, sources.map(source => cell(found.find(one => one.source === source)))));
  if (sources.length) lines.unshift(line('', sources.map(source => make('th', '', source))));
  const weights = data.quantities.filter(one => one.source === 'kept');
  return [...lines, ...weights.map(one => {
    const node = line(one.label, [cell(one)]);
    node.firstChild.colSpan = sources.length || 1;
    return node;
  })];
}
function showToken(place) {
  const shown = panel.querySelector('.shown'), where = panel.querySelector('.where'), now = panel.querySelector('.now');
  shown.replaceChildren();
  panel.className = place === null ? 'idle' : '';
  panel.querySelector('tbody').replaceChildren(...facts(place));
  now.replaceChildren(make('span', '', quantity.label), make('b', '', valueText(quantity, place, ' nats')));
  if (place === null) {
    where.textContent = '';
    panel.querySelector('.truth').textContent = 'Point at a token, tap it, or go to the text and use the arrow keys.';
    panel.querySelector('.list').replaceChildren();
    return;
  }
  const [number_, inside] = docOf(place);
  fill(shown, data.names[row.ids[place]], true);
  where.textContent = `token ${place} \u00b7 id ${row.ids[place]} \u00b7 ${inside} of document ${number_ + 1}`;
  panel.querySelector('.truth').textContent = truth(place);
  panel.querySelector('.list').replaceChildren(...candidates(place));
  panel.querySelector('.list').scrollTop = 0;
}
function choose(place, scroll) {
  if (chosen !== null && tokens[chosen]) tokens[chosen].classList.remove('chosen');
  chosen = place;
  if (place !== null) {
    tokens[place].classList.add('chosen');
    if (scroll) tokens[place].scrollIntoView({ block: 'nearest' });
  }
  showToken(place);
  remember();
}
function remember() {
  const parts = ['row=' + row.row, 'by=' + quantity.key];
  if (chosen !== null) parts.push('token=' + chosen);
  try { history.replaceState(null, '', '#' + parts.join('&')); } catch (error) { /* some viewers refuse addresses */ }
}
function otherLine(down) {  // the token on the next line that is nearest to the chosen one
  const here = tokens[chosen].getClientRects()[0], middle = here.left + here.width / 2;
  let best = null, bestLine = null, bestFar = Infinity;
  for (let n = chosen; n >= 0 && n < tokens.length; n += down ? 1 : -1) {
    const box = tokens[n].getClientRects()[0];
    if (!box || (down ? box.top <= here.top + 4 : box.top >= here.top - 4)) continue;
    if (bestLine === null) bestLine = box.top;
    if (Math.abs(box.top - bestLine) > 4) break;
    const far = Math.abs(box.left + box.width / 2 - middle);
    if (far < bestFar) { best = n; bestFar = far; }
  }
  return best === null ? chosen : best;
}
function step(by) {
  const wanted = Number(rowChoice.value) + by;
  if (wanted < 0 || wanted >= data.rows.length) return;
  showRow(wanted);
  window.scrollTo(0, 0);
  if (document.activeElement === text) choose(0, false); else remember();
}
text.addEventListener('pointerover', event => {
  const node = event.target.closest('.t');
  if (!node || event.pointerType === 'touch') return;
  node.classList.add('look');
  showToken(Number(node.dataset.n));
});
text.addEventListener('pointerout', event => {
  const node = event.target.closest('.t');
  if (node) node.classList.remove('look');
});
text.addEventListener('pointerleave', () => showToken(chosen));
text.addEventListener('click', event => {
  const node = event.target.closest('.t');
  if (node) choose(Number(node.dataset.n), false);
});
text.addEventListener('focus', () => { if (chosen === null && text.matches(':focus-visible')) choose(0, false); });
text.addEventListener('keydown', event => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const last = tokens.length - 1, now = chosen === null ? 0 : chosen;
  const moves = {
    ArrowRight: () => Math.min(last, now + 1), ArrowLeft: () => Math.max(0, now - 1),
    ArrowDown: () => otherLine(true), ArrowUp: () => otherLine(false), Home: () => 0, End: () => last,
  };
  if (event.key === 'PageDown' || event.key === 'PageUp') step(event.key === 'PageDown' ? 1 : -1);
  else if (event.key === 'Escape') choose(null, false);
  else if (moves[event.key]) { if (chosen === null) chosen = 0; choose(moves[event.key](), true); }
  else return;
  event.preventDefault();
});
$('previous').addEventListener('click', () => step(-1));
$('next').addEventListener('click', () => step(1));
rowChoice.addEventListener('change', () => { showRow(Number(rowChoice.value)); remember(); });
quantityChoice.addEventListener('change', () => {
  quantity = data.quantities[quantityChoice.value];
  paint();
  showToken(chosen);
  remember();
});
data.rows.forEach((one, n) => rowChoice.append(new Option(`row ${one.row}${one.left_out ? ' (not drawn)' : ''}`, n)));
for (const source of new Set(data.quantities.map(one => one.source))) {
  const group = make('optgroup');
  group.label = source;
  data.quantities.forEach((one, n) => { if (one.source === source) group.append(new Option(one.label, n)); });
  quantityChoice.append(group);
}
const wanted = new URLSearchParams(location.hash.slice(1));
const nothing = { key: '', label: 'nothing', unit: '', scale: 'linear', about: '', top: 1 };
quantity = data.quantities.find(one => one.key === wanted.get('by')) || data.quantities[0] || nothing;
if (quantity === nothing) document.querySelector('.by').hidden = $('legend').hidden = true;
else quantityChoice.value = data.quantities.indexOf(quantity);
showRow(Math.max(0, data.rows.findIndex(one => String(one.row) === wanted.get('row'))));
if (wanted.has('token') && tokens[Number(wanted.get('token'))]) choose(Number(wanted.get('token')), true);
"""
