"""Style of the page of `potstill inspect --html`.

One hue whose lightness rises with the value, and a second one where a figure has two signs (orange and blue, which the
colour blind tell apart); text keeps a contrast of at least 4.5 on the darkest shade, in both schemes. The panel has a
fixed size, so that nothing moves while one reads.
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1c1d1f; --soft: #62666d; --line: #d9dbdf; --paper: #fff; --card: #f6f7f8;
  --warm: #f59a2f; --cold: #66aef5; --mark: #0a58ca; --bar: #8fa3b8; --panel: 24rem; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e8ea; --soft: #a0a5ad; --line: #3a3e45; --paper: #15171a; --card: #1e2125;
    --warm: #b5620c; --cold: #2467ad; --mark: #8ab8ff; --bar: #5b6c7f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 0 1.25rem; color: var(--ink); background: var(--paper);
  font: 15px/1.45 system-ui, sans-serif; }
header { display: flex; gap: 1rem; align-items: baseline; flex-wrap: wrap; padding-top: .8rem; }
h1 { font-size: 1.15rem; margin: 0; }
details { color: var(--soft); font-size: .85rem; } dl { margin: .3rem 0; overflow-wrap: anywhere; }
dt { font-weight: 600; } dd { margin: 0 0 .3rem; }
select, button, .rows a { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: .25rem .6rem; min-height: 2.2rem; text-decoration: none; }
select { max-width: 100%; } button:disabled { opacity: .4; }
:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
.bar { position: sticky; top: 0; z-index: 2; background: var(--paper); display: flex; gap: .5rem 1.4rem;
  flex-wrap: wrap;
  align-items: center; padding: .6rem 0; border-bottom: 1px solid var(--line); }
.rows { display: flex; gap: .25rem; } .by { display: flex; gap: .5rem; align-items: center; min-width: 0; }
#legend { flex: 0 0 15rem; font-size: .75rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.ramp { height: .8rem; border: 1px solid var(--line); border-radius: 3px; }
.ticks { position: relative; height: 1.1rem; } .ticks span { position: absolute; transform: translateX(-50%);
  white-space: nowrap; }
.ticks span:first-child { transform: none; } .ticks span:last-child { transform: translateX(-100%); }
#summary { margin: .6rem 0; color: var(--soft); font-size: .85rem; min-height: 1.4em; }
#summary b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
  #summary span { margin-right: 1.1em;
  display: inline-block; }
#note { margin: .2rem 0 .9rem; font-size: .88rem; max-width: 44rem; padding-left: .7rem;
  border-left: 3px solid var(--cold); } #note:empty { display: none; } #note.out { border-color: var(--warm); }
main { display: grid; grid-template-columns: minmax(0, 1fr) var(--panel); gap: 2rem; align-items: start; }
#text { font-size: 1.06rem; line-height: 1.85; max-width: 44rem; overflow-wrap: anywhere; white-space: pre-wrap;
  border-radius: 6px; padding-bottom: 2rem; }
#text:focus-visible { outline-offset: 6px; }
.t { border-radius: 3px; cursor: pointer; padding: .12em 0; scroll-margin: 6rem 0 3rem; }
.ids .t { margin-right: .45em; font-variant-numeric: tabular-nums; }
.t.special { font-size: .75em; color: var(--soft); border: 1px solid var(--line); padding: .05em .3em; }
.t.part, .sign { color: var(--soft); opacity: .75; font-size: .85em; }
.t.none { border-bottom: 1px dotted var(--soft); }
.t.masked { color: var(--soft); border-bottom: 1px dashed var(--soft); }
#masks { margin: 0 0 .6rem; color: var(--soft); font-size: .8rem; } #masks .t { cursor: auto; }
.t.look { box-shadow: 0 0 0 1.5px var(--soft); } .t.chosen { box-shadow: 0 0 0 2px var(--mark); }
.doc { white-space: normal; color: var(--soft); font-size: .75rem; line-height: 1.4;
  border-top: 1px solid var(--line);
  margin: 1rem 0 .4rem; padding-top: .2rem; } .doc:first-child { margin-top: 0; }
#panel { position: sticky; top: 4.6rem; margin-top: .8rem; height: calc(100vh - 7.9rem); min-height: 24rem;
  max-height: 46rem; display: flex;
  flex-direction: column; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem; }
.token { display: flex; gap: .6rem; align-items: baseline; justify-content: space-between; height: 1.9rem; }
.shown { font-size: 1.15rem; font-weight: 600; white-space: pre; overflow: hidden; text-overflow: ellipsis; }
.where { color: var(--soft); font-size: .8rem; white-space: nowrap; }
.truth { margin: 0 0 .4rem; height: 2.7em; overflow: hidden; font-size: .88rem; }
.facts { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; width: 100%; }
.facts td { padding: .05rem 0; color: var(--soft); } .facts td + td { text-align: right; color: var(--ink);
  white-space: nowrap; }
.facts th { text-align: right; font-weight: 400; color: var(--soft); white-space: nowrap; padding-left: .6rem; }
.facts td.now { font-weight: 700; text-decoration: underline 2px var(--mark); text-underline-offset: 3px; }
p.now { display: none; margin: .2rem 0; justify-content: space-between; font-size: .88rem; }
.list { flex: 1; overflow-y: auto; margin-top: .5rem; border-top: 1px solid var(--line); padding-top: .3rem;
  scrollbar-gutter: stable; font-size: .85rem; }
.c { display: grid; grid-template-columns: 1.5rem minmax(0, 1fr) 5rem 3.7rem 3.7rem; gap: .4rem; align-items: center;
  line-height: 1.65; font-variant-numeric: tabular-nums; }
.c > :nth-child(n+4) { text-align: right; } .c > :first-child, .c > :last-child { color: var(--soft); }
.c .name { white-space: pre; overflow: hidden; text-overflow: ellipsis; }
.c .meter { background: var(--line); height: .55rem; border-radius: 2px; overflow: hidden; }
.c .meter i { display: block; height: 100%; background: var(--bar); }
.c.true { font-weight: 700; background: color-mix(in oklab, var(--mark) 16%, transparent); border-radius: 3px; }
 .c.true .meter i { background: var(--mark); } .c.true > :first-child { color: var(--mark); }
.c.rest { color: var(--soft); } .c.head { color: var(--soft); font-size: .75rem;
  white-space: nowrap; } .c.head > * { text-align: right; } .c.head > :nth-child(2) { text-align: left; }
.c.rest .meter i { background: repeating-linear-gradient(135deg, var(--bar) 0 3px, transparent 3px 5px); }
.sign { font-family: ui-monospace, monospace; }
footer { color: var(--soft); font-size: .8rem; margin: 1.5rem 0; } kbd { border: 1px solid var(--line);
  border-radius: 3px;
  padding: 0 .3em; font-size: .9em; }
@media (max-width: 860px) {
  body { padding: 0 .8rem 46vh; }
  main { display: block; }
  .bar { gap: .4rem .8rem; } .by { flex: 1 1 100%; } .by select { flex: 1; min-width: 0; } #legend { flex: 1 1 9rem; }
  #panel { position: fixed; z-index: 3; inset: auto 0 0 0; top: auto; height: 41vh; min-height: 0; max-height: none;
    border-radius: 12px 12px 0 0; padding: .5rem .8rem; box-shadow: 0 -4px 18px rgb(0 0 0 / .18); }
  .facts, #summary .minor { display: none; } p.now { display: flex; } .truth { height: 3em; margin: 0; }
  .bar { position: static; }
  #panel.idle { height: auto; } .idle .list, .idle .token, .idle .now { display: none; }
  .t { scroll-margin: 1rem 0 44vh; }
}
@media (prefers-reduced-motion: no-preference) { .c .meter i { transition: width .08s; } }
"""
