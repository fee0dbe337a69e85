"""What an export says besides the weights: its model card, and the `use_cache` of its source."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.common.config import build_config
from potstill.common.errors import ConfigError, UserError
from potstill.storage import StoreReader
from potstill.student_train import export
from potstill.student_train.config.train import ExportConfig, ModelConfig
from potstill.student_train.hf_export.hf_folder import source_use_cache
from potstill.student_train.hf_export.model_card import LICENSE_PLACEHOLDER, markdown_table
from tests.dist_harness import run_ranks
from tests.hub_server import serve_hub
from tests.student_train import tiny, workers


def export_run(run: Path, output: Path) -> str:
    """Export without the check in a fresh process; returns the card."""
    values = {"run": str(run), "output_dir": str(output), "check": False}
    assert "fill in the licence" in export(build_config(ExportConfig, values, source="test")).format()
    return (output / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A distilled run of two stages with selectors and a run on labels, over stores of their own that may move."""
    folder = tmp_path_factory.mktemp("card")
    stores = tiny.write_all(folder / "stores")
    stages = [
        {"name": "easy", "until": 0.5, "targets": "teacher", "alpha": {"kind": "linear", "start": 0.9, "end": 0.2},
         "rows": {"score": {"of": [{"store": "slm"}]}, "keep": "lowest", "share": 0.5, "segments": 1},
         "tokens": {"policy": "label_rank", "source": "slm", "max_rank": 5}},
        {"name": "all"},
    ]  # fmt: skip
    tree = tiny.config_tree(stores, folder / "mine", run={"max_steps": 4, "name": "a|name"}, curriculum=stages)
    tree["checkpoint"] = {"every_steps": 2}
    run_ranks(workers.train_run, tree, world=1)
    tree = tiny.config_tree(stores, folder / "labels", run={"max_steps": 2}, curriculum=[{}])
    tree["data"] |= {"targets": {}, "scores": {}}
    tree["model"]["config"]["use_cache"] = False
    run_ranks(workers.train_run, tree, world=1)
    return {"distilled": folder / "mine", "labels": folder / "labels", **stores}


def test_use_cache_is_that_of_the_source(places: dict[str, Path], tmp_path: Path) -> None:
    for name, wanted in (("distilled", True), ("labels", False)):
        export_run(places[name], tmp_path / name)
        for file in ("config.json", "generation_config.json"):
            assert json.loads((tmp_path / name / file).read_text()).get("use_cache", True) is wanted, (name, file)


def test_use_cache_of_each_kind_of_source(start_weights: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(start_weights, tmp_path / "weights")
    values = json.loads((copy / "config.json").read_text()) | {"use_cache": False}
    (copy / "config.json").write_text(json.dumps(values))
    assert source_use_cache(ModelConfig(path=start_weights)) is True
    for model in (ModelConfig(path=copy), ModelConfig(config=copy), ModelConfig(config=copy / "config.json")):
        assert source_use_cache(model) is False
    assert source_use_cache(ModelConfig(config=tmp_path / "gone")) is True


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_of_a_distilled_run(places: dict[str, Path], tmp_path: Path) -> None:
    card = export_run(places["distilled"], tmp_path / "hf")
    head = front_matter(card)
    assert head["library_name"] == "transformers" and head["license"] == LICENSE_PLACEHOLDER
    assert head["tags"] == ["potstill", "knowledge-distillation"]
    teacher = StoreReader(places["teacher"])
    assert f"| teacher | bigram | `{'0' * 64}` | float32 |" in card
    for name in ("tokens", "teacher", "scores", "heldout", "heldout_teacher"):
        reader = StoreReader(places[name])
        assert f"`{reader.digest}` | `{reader.spec.fingerprint}`" in card, name
    assert teacher.spec.selection is not None and "mode top_k, k 6" in card
    assert "| optimizer steps | 4 |" in card and "| rows | 16 " in card
    assert f"| tokens | {sum_of_tokens(places['distilled']):,} |" in card
    assert "| easy | 0.5 | teacher | 0.9 to 0.2 (linear) | 1 - alpha | 1 (both) |" in card
    assert "lowest 0.5 by stat (mean_loss of slm) | label_rank by slm, share 1, floor 0, for all |" in card
    assert "| all | the end | none (labels) | 0 | 1 | - | - | all | all |" in card
    figures = json.loads((places["distilled"] / "done.json").read_text())["heldout"]
    assert f"| loss (nats per token) | {figures['heldout_loss']:.5g} |" in card and "at step 4." in card
    digest = hashlib.sha256((places["distilled"] / "config.yaml").read_bytes()).hexdigest()
    assert "potstill train --config config.yaml" in card and digest in card
    assert str(places["distilled"].parent) not in card, "no path of this machine"
    assert "# a|name" in card and "torch 2" in card


def sum_of_tokens(run: Path) -> int:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return int([line for line in lines if line["kind"] == "train"][-1]["tokens"])


def test_the_card_of_an_earlier_checkpoint_has_no_later_figures(places: dict[str, Path], tmp_path: Path) -> None:
    card = export_run(places["distilled"] / "checkpoints" / "step_00000002", tmp_path / "hf")
    assert "optimizer step 2 of 4" in card
    assert "Not recorded: the run had no evaluation up to this step." in card


def test_the_card_of_a_run_on_labels(places: dict[str, Path], tmp_path: Path) -> None:
    card = export_run(places["labels"], tmp_path / "student")
    assert front_matter(card)["tags"] == ["potstill"]
    assert "# student\n" in card and "trained on labels alone" in card
    assert "None: no stage of the curriculum read targets." in card


def test_the_card_of_a_run_whose_stores_have_gone_or_changed(places: dict[str, Path], tmp_path: Path) -> None:
    run = shutil.copytree(places["distilled"], tmp_path / "mine")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["scores"]["slm"] = config["data"]["heldout"] = str(tmp_path / "nowhere")
    config["data"]["heldout_targets"] = str(tmp_path / "nowhere")
    config["data"]["targets"]["teacher"] = str(places["early_teacher"])
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    card = export_run(run, tmp_path / "hf")
    pinned = json.loads((run / "checkpoints" / "step_00000004" / "potstill.json").read_text())["stores"]
    lost = "not recorded | not recorded | not recorded"
    gone = "the store could not be read when this card was written"
    assert f"`{pinned['slm']}` | not recorded | {gone} |" in card
    assert f"| teacher | targets | {lost} | `{pinned['teacher']}` | not recorded | the store at that place is " in card
    assert f"| heldout | tokens | {lost} | not recorded | not recorded | {gone} |" in card
    assert "| teacher | not recorded | not recorded | not recorded |" in card
    assert StoreReader(places["early_teacher"]).digest not in card


def test_cells_of_a_table_cannot_break_out() -> None:
    assert markdown_table(("a",), [("x|y\nz",)]) == "| a |\n| --- |\n| x\\|y z |"


PUSHED = {"push": "acme/student", "license": "apache-2.0"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({**PUSHED, "check": False}, "push needs check"),
        ({"push": "acme/student"}, "push needs license"),
        ({"private": True}, "name it as push"),
        ({**PUSHED, "push": "student"}, "push"),
    ],
)
def test_what_cannot_be_pushed_is_said_at_once(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(ExportConfig, {"run": "x", "output_dir": "y", **wrong}, source="test")


@pytest.mark.slow
def test_an_export_is_pushed_after_its_check(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a hub on the loopback, by the hub's own client: the card with its licence, and no path of this machine."""
    pushed = {"run": str(places["distilled"]), "output_dir": str(tmp_path / "out" / "student"), **PUSHED}
    config = build_config(ExportConfig, pushed, source="test")
    with serve_hub() as hub:
        hub.speak_to(monkeypatch, tmp_path / "hub")
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(UserError, match="does not know the token"):
            export(config)
        assert not (tmp_path / "out").exists()  # said before the work, not after it
        hub.speak_to(monkeypatch, tmp_path / "hub")
        said = export(config).format()
        (commit,) = hub.repositories["models", "acme/student"].branches.values()
        files = hub.repositories["models", "acme/student"].commits[commit]
    assert f"pushed to {hub.address}/acme/student/tree/{commit}" in said and "fill in" not in said
    card = files["README.md"].decode()
    assert front_matter(card)["license"] == "apache-2.0" and "Licence: apache-2.0." in card
    assert StoreReader(places["teacher"]).digest in card and "| teacher | bigram |" in card
    assert files["model.safetensors"] == (tmp_path / "out" / "student" / "model.safetensors").read_bytes()
    for name, data in files.items():
        assert str(tmp_path.parent.parent).encode() not in data, name
    assert json.loads(files["potstill_export.json"])["checkpoint"] == "checkpoints/step_00000004"
