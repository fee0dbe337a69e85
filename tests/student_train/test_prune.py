"""Pruned starts: what is cut, what stays as it was, what is refused, and a student that trains from the folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from potstill.common.config import build_config
from potstill.common.errors import UserError
from potstill.common.packed import probe_ids
from potstill.common.token_table import tokenizer_digest
from potstill.storage import StoreReader, StoreWriter, seal_store
from potstill.student_train import PruneConfig, prune
from potstill.student_train.data.packed import collate_rows
from potstill.student_train.data.store_tokenizer import read_tokenizer
from potstill.student_train.pruning import importance as importances
from potstill.student_train.pruning.cutting import Kept, choose, cut, norm_factors
from potstill.student_train.pruning.folder import PRUNE_FILE, _cast, calibration_rows
from potstill.student_train.pruning.importance import Importance, measure
from potstill.student_train.pruning.shape import ARCHITECTURES, Shape, shape_of, wanted_shape
from tests.student_train import tiny

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
SMALLER = {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "num_layers": 2}


def model_of(kind: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A small model in float64 whose activations are not all alike."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    values = {**SIZES, **HEADS, "vocab_size": tiny.VOCAB, "initializer_range": 0.3, "rms_norm_eps": 1e-12, **changes}
    config = AutoConfig.for_model(kind, **values)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=probe_ids(torch.arange(24).view(2, 12), tiny.VOCAB)).logits


@pytest.fixture(scope="module")
def rows(stores: dict[str, Path]) -> list[Any]:
    reader = StoreReader(stores["tokens"])
    found = reader.tokens_rows(np.arange(reader.num_rows))
    return [found[number] for number in (0, 1, len(found) - 1)]  # the last one is shorter


def measured(model: Any, rows: list[Any], **options: Any) -> Importance:
    """The importance in batches of one row and of two, of which one is padded."""
    batches = [(collate_rows(part), torch.tensor([len(row.tokens) for row in part])) for part in (rows[:1], rows[1:])]
    return measure(model, lambda: iter(batches), head_dim=HEADS["head_dim"], **{"depth_by": "cosine", **options})


def all_of(shape: Shape) -> Kept:
    layers = shape.num_layers
    each = [torch.arange(size).repeat(layers, 1) for size in (40, shape.num_heads, shape.num_kv_heads)]
    return Kept(torch.arange(shape.hidden_size), *each, torch.arange(layers))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_same_size_gives_the_same_logits(kind: str, tied: bool, rows: list[Any]) -> None:
    model = model_of(kind, tie_word_embeddings=tied)
    whole = shape_of(model.config)
    found = measured(model, rows)
    kept = choose(found, whole, whole)
    same = cut(model, kept, whole, whole, norm_factors(found, kept))
    torch.testing.assert_close(logits(same), logits(model), rtol=0, atol=0)
    assert {name: value.tolist() for name, value in vars(kept).items()} == {
        name: value.tolist() for name, value in vars(all_of(whole)).items()
    }


@torch.no_grad()
def silence(model: Any) -> None:
    """Make channels 1, 7, 8, neurons 0 and 5 of layer 0 and 3 and 4 of layer 2, query heads 0 and 3, and layer 1 add
    nothing to anything."""
    channels, inner = [1, 7, 8], torch.arange(HEADS["head_dim"])
    core = model.model
    core.embed_tokens.weight[:, channels] = 0
    for number, layer in enumerate(core.layers):
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight[channels] = 0
            if number == 1:
                projection.weight.zero_()
        layer.self_attn.o_proj.weight[:, torch.cat([inner, 3 * HEADS["head_dim"] + inner])] = 0
    for layer, neurons in zip(core.layers[::2], ([0, 5], [3, 4]), strict=True):
        layer.mlp.up_proj.weight[neurons] = 0


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_cutting_what_is_zero_changes_nothing(kind: str, rows: list[Any]) -> None:
    model = model_of(kind, tie_word_embeddings=True)
    silence(model)
    whole, found = shape_of(model.config), measured(model, rows)
    sizes = {"hidden_size": 21, "intermediate_size": 38, "num_layers": 2}
    wanted = Shape(**{**whole.as_dict(), **sizes})
    kept = choose(found, whole, wanted)
    assert sorted({*range(24)} - {*kept.channels.tolist()}) == [1, 7, 8] and kept.layers.tolist() == [0, 2]
    assert [sorted({*range(40)} - {*kept.neurons[n].tolist()}) for n in (0, 2)] == [[0, 5], [3, 4]]
    smaller = cut(model, kept, whole, wanted, norm_factors(found, kept))
    exact = {"rtol": 0.0, "atol": 2e-5}  # the norms of transformers compute in float32
    torch.testing.assert_close(logits(smaller), logits(model), **exact)
    plain = cut(model, kept, whole, wanted, dict.fromkeys(found.energy, 1.0))
    assert float((logits(plain) - logits(model)).abs().max()) > 0.01, "a norm over fewer channels is another one"
    # The heads' outputs are not zero, only what becomes of them: said by hand, one of each group goes.
    heads = Kept(kept.channels, kept.neurons, torch.tensor([[1, 2]] * 3), torch.tensor([[0, 1]] * 3), kept.layers)
    fewer = Shape(**{**wanted.as_dict(), "num_heads": 2})
    without = cut(model, heads, whole, fewer, norm_factors(found, heads))
    torch.testing.assert_close(logits(without), logits(model), **exact)
    assert without.config.head_dim == HEADS["head_dim"] and without.model.layers[0].self_attn.q_proj.out_features == 12


def test_importance_is_what_it_says(rows: list[Any]) -> None:
    """Against the model's own outputs, row by row without padding."""
    model = model_of()
    found = measured(model, rows)
    channels, neurons, cosines, heads = 0, 0, [], 0
    layer = model.model.layers[1]
    for row in rows:
        seen: dict[str, Tensor] = {}

        def keep(name: str, seen: dict[str, Tensor] = seen) -> Any:
            return lambda module, given, out: seen.update({f"{name} in": given[0], f"{name} out": out})

        parts = {"layer": layer, "down": layer.mlp.down_proj, "o": layer.self_attn.o_proj, "norm": model.model.norm}
        handles = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
        batch = collate_rows([row])
        with torch.no_grad():
            model(**batch.model_inputs(model.config))
        for handle in handles:
            handle.remove()
        neurons = neurons + seen["down in"][0].abs().mean(0).square()
        heads = heads + seen["o in"][0].view(-1, 4, 6).norm(dim=-1).mean(0).square()
        channels = channels + seen["norm out"][0].abs().mean(0).square()
        cosines.append(torch.cosine_similarity(seen["layer in"][0], seen["layer out"][0], dim=-1))
    torch.testing.assert_close(found.neurons[1], neurons.sqrt(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.heads[1], heads.sqrt(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.layers[1], 1 - torch.cat(cosines).mean(), rtol=1e-5, atol=1e-6)
    # The final norm is one of seven that are added up.
    assert bool((found.channels > channels.sqrt() - 1e-6).all())
    assert found.channels.sum() > 2 * channels.sqrt().sum()


def test_depth_by_loss_leaves_out_what_the_loss_does_not_miss(rows: list[Any]) -> None:
    model = model_of()
    silence(model)
    whole = measured(model, rows, depth_by="loss")
    assert abs(float(whole.layers[1])) < 1e-9 and float(whole.layers[::2].abs().min()) > 1e-3
    with torch.no_grad():
        one_less = model_of()
        silence(one_less)
        del one_less.model.layers[2]
        batches = [collate_rows([row]) for row in rows]
        rise = importances.mean_loss(one_less, batches) - importances.mean_loss(model, batches)
    assert float(whole.layers[2]) == pytest.approx(rise, abs=1e-6)


def test_heads_keep_their_groups() -> None:
    heads = torch.tensor([[1.0, 5.0, 2.0, 2.5, 9.0, 0.0]])  # three key heads of two queries
    whole = Shape(hidden_size=2, intermediate_size=2, num_heads=6, num_kv_heads=3, num_layers=1, head_dim=4)
    found = Importance(torch.ones(2), torch.ones(1, 2), heads, torch.ones(1), {}, 0.0)

    def kept(num_heads: int, num_kv_heads: int) -> tuple[list[int], list[int]]:
        wanted = Shape(**{**whole.as_dict(), "num_heads": num_heads, "num_kv_heads": num_kv_heads})
        chosen = choose(found, whole, wanted)
        return chosen.heads[0].tolist(), chosen.kv_heads[0].tolist()

    assert kept(3, 3) == ([1, 3, 4], [0, 1, 2])
    assert kept(4, 2) == ([0, 1, 4, 5], [0, 2])
    assert kept(2, 2) == ([1, 4], [0, 2])
    assert kept(1, 1) == ([4], [2])


def config_of(model: Path, stores: dict[str, Path], output: Path, **changes: Any) -> PruneConfig:
    values = {"model": str(model), "tokens": str(stores["tokens"]), "output_dir": str(output), "check": False}
    values["check_tokenizer"] = stores["tokens"].parent.name.startswith("own")
    return build_config(PruneConfig, {**values, "calibration_rows": 5, "batch_rows": 2, **changes}, source="test")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prune") / "teacher"
    model_of("qwen3", tie_word_embeddings=True).float().save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({str(number): number for number in range(tiny.VOCAB)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own_rows(teacher: Path, stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rows that were made with the teacher's own tokenizer."""
    place = tmp_path_factory.mktemp("own") / "tokens"
    rows = StoreReader(stores["tokens"])
    spec = replace(rows.spec, tokenizer_digest=tokenizer_digest(read_tokenizer(teacher)))
    writer = StoreWriter.create(place, spec)
    for unit in range(writer.num_units or -(-rows.num_rows // spec.rows_per_unit)):
        first = unit * spec.rows_per_unit
        writer.commit_unit(unit, rows.tokens_rows(range(first, min(first + spec.rows_per_unit, rows.num_rows))))
    seal_store(place)
    return {"tokens": place}


def test_the_folder_is_a_model_and_says_what_was_kept(teacher: Path, own_rows: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    stores = own_rows

    output = tmp_path / "start"
    summary = prune(config_of(teacher, stores, output, **SMALLER, dtype="bfloat16"))
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    found = shape_of(model.config)
    assert found == Shape(**{**SMALLER, "num_kv_heads": 2, "head_dim": 6})
    assert model.model.layers[0].self_attn.q_norm.weight.shape == (6,)
    assert bool(logits(model.double()).isfinite().all())
    record = json.loads((output / PRUNE_FILE).read_text())
    assert record["calibration_rows"] == 5 and record["tokens_digest"] == StoreReader(stores["tokens"]).digest
    kept = record["kept"]
    assert kept["layers"] == summary.layers and len(kept["channels"]) == 16 and len(kept["neurons"][0]) == 24
    whole = AutoModelForCausalLM.from_pretrained(teacher)
    wanted = whole.model.embed_tokens.weight[:, kept["channels"]].bfloat16().float()
    torch.testing.assert_close(model.model.embed_tokens.weight.float(), wanted, rtol=0, atol=0)
    own = whole.model.layers[kept["layers"][1]].mlp.up_proj.weight
    wanted = own[kept["neurons"][1]][:, kept["channels"]].bfloat16().float()
    torch.testing.assert_close(model.model.layers[1].mlp.up_proj.weight.float(), wanted, rtol=0, atol=0)
    card = (output / "README.md").read_text()
    assert "Not trained since" in card and "| hidden_size | 24 | 16 |" in card and str(tmp_path) not in card
    assert (output / "tokenizer.json").read_text() == (teacher / "tokenizer.json").read_text()
    text = summary.format()
    assert "hidden_size 16 of 24" in text and "not checked" in text and summary.losses[1] > 0
    with pytest.raises(UserError, match=r"output_dir .* exists; name another folder, or replace it with --force"):
        prune(config_of(teacher, stores, output, **SMALLER))


def test_a_cast_spares_what_a_reload_computes_anew() -> None:
    """Frequencies of the rotary embedding in bfloat16 give other logits than the folder does."""
    model = _cast(model_of().float(), "bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.slow
def test_the_folder_is_compared_in_a_fresh_process(teacher: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        summary = prune(config_of(teacher, stores, tmp_path / dtype, **SMALLER, dtype=dtype, check=True))
        assert summary.logits_difference is not None and summary.logits_difference < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 25}, "hidden_size is 25, but the model has 24"),
        ({"num_layers": 4}, "num_layers is 4, but the model has 3"),
        ({"num_heads": 3}, "num_heads 3 and num_kv_heads 2 do not fit"),
        ({"num_heads": 4, "num_kv_heads": 1}, "num_heads 4 and num_kv_heads 1 do not fit"),
    ],
)
def test_sizes_that_cannot_be(
    changes: dict[str, int], message: str, teacher: Path, stores: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        prune(config_of(teacher, stores, tmp_path / "start", **changes))
    assert list(tmp_path.iterdir()) == []


def test_heads_of_a_model_without_groups_go_with_their_keys() -> None:
    whole = Shape(hidden_size=8, intermediate_size=8, num_heads=4, num_kv_heads=4, num_layers=1, head_dim=2)
    config = PruneConfig(model=Path("m"), tokens=Path("t"), output_dir=Path("o"), num_heads=2)
    assert wanted_shape(config, whole).num_kv_heads == 2
    # A key head that goes takes its queries with it.
    grouped = Shape(**{**whole.as_dict(), "num_heads": 8})
    config = PruneConfig(model=Path("m"), tokens=Path("t"), output_dir=Path("o"), num_kv_heads=3)
    assert wanted_shape(config, grouped).num_heads == 6


def test_other_architectures_and_other_rows_are_refused(teacher: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    gpt2 = AutoConfig.for_model("gpt2", vocab_size=tiny.VOCAB, n_embd=8, n_layer=1, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(gpt2).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match=r"model is a gpt2, .* expected one of llama, mistral, qwen2, qwen3"):
        prune(config_of(tmp_path / "gpt2", stores, tmp_path / "start"))
    model_of(vocab_size=tiny.VOCAB - 1).save_pretrained(tmp_path / "few")
    with pytest.raises(UserError, match="vocab_size 47, the rows of tokens ids below 48"):
        prune(config_of(tmp_path / "few", stores, tmp_path / "start"))
    model_of(max_position_embeddings=31).save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match="reads at most 31 positions, the rows of tokens hold 32"):
        prune(config_of(tmp_path / "short", stores, tmp_path / "start"))


def test_what_is_read_is_not_replaced_and_rows_are_of_the_tokenizer(
    teacher: Path, stores: dict[str, Path], own_rows: dict[str, Path], tmp_path: Path
) -> None:
    places = [
        (teacher, "model"),
        (teacher.parent, "model"),
        (own_rows["tokens"].parent, "tokens"),
        (Path(), "the folder"),
    ]
    for output, holds in places:
        with pytest.raises(UserError, match=f"output_dir .* is or holds {holds} .*; name a folder of its own"):
            prune(config_of(teacher, own_rows, output, force=True))
    assert (teacher / "config.json").is_file() and StoreReader(own_rows["tokens"]).num_rows
    with pytest.raises(UserError, match=r"has a tokenizer with the digest .* rows made with the model's tokenizer"):
        prune(config_of(teacher, stores, tmp_path / "start", check_tokenizer=True))


def test_rows_are_spread_over_the_store(stores: dict[str, Path]) -> None:
    tokens = StoreReader(stores["tokens"])
    assert calibration_rows(tokens, 4).tolist() == [0, 13, 26, 39]
    assert calibration_rows(tokens, 1000).tolist() == list(range(tokens.num_rows))
