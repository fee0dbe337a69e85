"""What tests run on a rank: whole training runs, and the gradients of one optimizer step."""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import resource
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from potstill.common.config import build_config
from potstill.common.errors import UserError
from potstill.storage import Loader
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.data.batch import collate
from potstill.student_train.data.stores import build_plan, open_stores
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.router import RouterBalance
from potstill.student_train.model.student import TrainRequest, build_student


def config_of(tree: dict[str, Any]) -> TrainConfig:
    """The checked configuration of plain values."""
    return build_config(TrainConfig, tree, source="test")


def train_run(tree: dict[str, Any]) -> dict[str, Any]:
    """Train as a rank; returns the summary as plain values."""
    from potstill.student_train.run.trainer import train

    summary = train(config_of(tree))
    return {"status": summary.status, "steps": summary.steps, "tokens": summary.tokens}


def train_runs(trees: list[dict[str, Any]]) -> list[str]:
    """Train one run after the other in this process; what each ended with, in words."""
    from potstill.common.errors import UserError

    endings = []
    for tree in trees:
        try:
            endings.append(str(train_run(tree)["status"]))
        except UserError as error:
            endings.append(f"{type(error).__name__}: {error}")
    return endings


def train_all_runs(*trees: dict[str, Any]) -> list[str]:
    """As train_runs, with any exception as an ending."""
    import traceback

    endings = []
    for tree in trees:
        try:
            endings.append(str(train_run(tree)["status"]))
        except Exception:
            endings.append(traceback.format_exc())
    return endings


def train_with_plain_sgd(tree: dict[str, Any]) -> int:
    """Train as a rank with `optimizer.kind: plain`, an entry added here; returns the steps that it took."""
    from potstill.student_train.config.optimizers import OPTIMIZERS

    steps: list[float] = []

    class Counted(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            steps.append(self.param_groups[0]["lr"])
            return super().step(closure)

    def plain(student: torch.nn.Module, options: Any, device: torch.device) -> torch.optim.Optimizer:
        return Counted(student.parameters(), lr=options.lr)

    OPTIMIZERS["plain"] = plain
    train_run(tree)
    return len(steps)


def train_on_a_console(tree: dict[str, Any]) -> str:
    """Train as a rank as the command does, and return what comes on standard error."""
    import io

    from potstill.common.log import setup_logging

    with contextlib.redirect_stderr(io.StringIO()) as console:
        setup_logging()
        train_run(tree)
    return console.getvalue()


def train_elsewhere(tree: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Train with another home, temporary folder and way to the network, and end as a command ends."""
    os.environ.update(environment)
    tempfile.tempdir = None  # which the parent may have looked up
    try:
        return train_run(tree)
    finally:
        atexit._run_exitfuncs()  # a child of multiprocessing leaves without them


def changes_of(tree: dict[str, Any]) -> list[str]:
    """What a start with this configuration would log as changed in its run folder."""
    import logging

    from potstill.student_train.run.run_folder import log, report_changes

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        report_changes(config_of(tree))
    finally:
        log.removeHandler(handler)
    return lines


def engine_gradients(tree: dict[str, Any], step: int = 0) -> dict[str, np.ndarray]:
    """Gradients of optimizer step `step` by parameter name, as DeepSpeed has them right before it would step."""
    from deepspeed.utils import safe_get_full_grad

    from potstill.student_train.run import engine as dist

    config = config_of(tree)
    stores = open_stores(config)
    plan = build_plan(config, stores)
    topology = dist.start_distributed()
    ds_config = dist.deepspeed_config(config, world_size=topology.world_size)
    with dist.zero3_construction(ds_config):
        student = build_student(config.model, hf_config(config.model, vocab_size=48), seed=config.run.seed)
        engine = dist.build_engine(student, config, ds_config, topology)
    with Loader(plan, stores.tokens, dict(stores.joined), rank=topology.rank, world=topology.world_size) as loader:
        batch = next(batch for batch in loader if batch.batch == step)
    objective = plan.objective(step)
    micros = collate(batch, objective, micro_batch_rows=config.data.micro_batch_rows, row_length=32)
    weight = torch.tensor(sum(micro.weight_sum for micro in micros), dtype=torch.float64)
    dist.all_reduce_sum(weight)
    for number, micro in enumerate(micros):
        share = (weight / topology.world_size).float()
        loss, _ = engine(TrainRequest(micro, objective, share, len(micros)))
        engine.backward(loss * 1.0, scale_wrt_gas=False)
        if number < len(micros) - 1:
            engine.step()
    found = {
        name: safe_get_full_grad(parameter).detach().float().numpy().copy()
        for name, parameter in engine.module.named_parameters()
    }
    engine.destroy()
    return found


def plain_gradients(tree: dict[str, Any], step: int = 0, *, rows: slice = slice(None)) -> dict[str, np.ndarray]:
    """The same gradients without DeepSpeed, in float64, over all rows of the global batch or some of them."""
    config = config_of(tree)
    stores = open_stores(config)
    plan = build_plan(config, stores)
    student = build_student(config.model, hf_config(config.model, vocab_size=48), seed=config.run.seed).double()
    student.train()
    with Loader(plan, stores.tokens, dict(stores.joined)) as loader:
        batch = next(batch for batch in loader if batch.batch == step)
    objective = plan.objective(step)
    micros = collate(batch, objective, micro_batch_rows=1, row_length=32)
    weight = torch.tensor(sum(micro.weight_sum for micro in micros))
    for micro in micros[rows]:
        student(TrainRequest(micro, objective, weight, len(micros)))[0].backward()
    return {name: p.grad.float().numpy() for name, p in student.named_parameters() if p.grad is not None}


def tempered_teacher_gradients(tree: dict[str, Any], temperature: float, *, whole: bool) -> dict[str, np.ndarray]:
    """Gradients of alpha KL(p_T || q) + (1 - alpha) CE of the first global batch, from whole logits in float64.

    p_T is the teacher at `temperature` and q the student at 1. `whole`: on the kept entries and the stored tail at that
    temperature; else on the kept entries alone, which then share all mass.
    """
    config = config_of(tree)
    stores = open_stores(config)
    plan = build_plan(config, stores)
    student = build_student(config.model, hf_config(config.model, vocab_size=48), seed=config.run.seed).double()
    with Loader(plan, stores.tokens, dict(stores.joined)) as loader:
        batch = next(iter(loader))
    objective = plan.objective(0)
    rows = len(batch.rows)
    micro = collate(batch, objective, micro_batch_rows=rows, row_length=32)[0]
    log_q = student.hf.lm_head(student.hidden_states(micro)).log_softmax(-1)
    found = micro.labels >= 0
    loss = -(1 - objective.settings.alpha) * log_q[found].gather(1, micro.labels[found, None]).sum()
    for n in torch.nonzero(found)[:, 0].tolist():
        entries = slice(int(micro.targets.offsets[n]), int(micro.targets.offsets[n + 1]))
        ids, log_p = micro.targets.ids[entries].long(), micro.targets.logprobs[entries].double()
        p = (log_p / temperature).softmax(0)
        if whole:
            tail = micro.targets.log_tail_at[temperature][n].double().exp()
            p = p * (1 - tail)
            loss = loss + objective.settings.alpha * tail * (tail.log() - torch.log1p(-log_q[n, ids].exp().sum()))
        loss = loss + objective.settings.alpha * (torch.xlogy(p, p) - p * log_q[n, ids]).sum()
    (loss / micro.weight_sum).backward()
    return {name: p.grad.float().numpy() for name, p in student.named_parameters() if p.grad is not None}


def balanced_gradients(tree: dict[str, Any], step: int, *, coefficient: float) -> dict[str, np.ndarray]:
    """Gradients in float64, on one process, of the loss without load balancing + coefficient * mean of it by hand.

    Every row is a micro-batch. The load balancing loss is the formula of the paper, read off the routers' outputs.
    """
    config = config_of(tree)
    stores = open_stores(config)
    student_config = hf_config(config.model, vocab_size=48)
    student = build_student(config.model, student_config, seed=config.run.seed).double()
    student.hf.set_experts_implementation("eager")  # the grouped product has no float64
    student.terms = tuple(term for term in student.terms if not isinstance(term, RouterBalance))
    routers: list[torch.Tensor] = []
    for module in student.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(lambda module, inputs, output: routers.append(output[0]))
    plan = build_plan(config, stores)
    with Loader(plan, stores.tokens, dict(stores.joined)) as loader:
        batch = next(batch for batch in loader if batch.batch == step)
    objective = plan.objective(step)
    micros = collate(batch, objective, micro_batch_rows=1, row_length=32)
    weight = torch.tensor(sum(micro.weight_sum for micro in micros))
    for micro in micros:
        routers.clear()
        loss, _ = student(TrainRequest(micro, objective, weight, len(micros)))
        num_real = micro.labels.shape[0]  # a row's padding stands behind its real tokens
        probabilities = torch.cat([logits[:num_real].softmax(-1) for logits in routers])  # [layers * N, experts]
        num_experts = probabilities.shape[1]
        chosen = probabilities.topk(student_config.num_experts_per_tok).indices
        share = torch.stack([(chosen == expert).sum() for expert in range(num_experts)]) / len(probabilities)
        aux = num_experts * (share.double() * probabilities.mean(0)).sum()
        (loss + coefficient * aux / len(micros)).backward()
    return {name: p.grad.float().numpy() for name, p in student.named_parameters() if p.grad is not None}


def train_with_bad_weights(tree: dict[str, Any], step: int) -> dict[str, Any]:
    """Train, but poison the student's final norm before `step`: its loss is then NaN."""
    from potstill.student_train.run import loop, trainer

    honest = loop.agree

    def agree(run: Any, batch: Any) -> Any:
        answer = honest(run, batch)
        if run.state.step == step:
            with torch.no_grad():
                run.engine.module.hf.model.norm.weight.fill_(float("nan"))
        return answer

    loop.agree = agree
    return trainer.train(config_of(tree)).heldout


def train_with_a_bad_batch(tree: dict[str, Any], step: int) -> dict[str, Any]:
    """Train, but the loss of `step` is NaN, as after an overflow in one batch."""
    from potstill.student_train.run import loop, trainer

    honest, agree = TrainRequest.run, loop.agree
    now = [0]

    def watch(run: Any, batch: Any) -> Any:
        now[0] = run.state.step
        return agree(run, batch)

    def run(self: Any, student: Any) -> Any:
        loss, sums = honest(self, student)
        return (loss * float("nan") if now[0] == step else loss), sums

    loop.agree, TrainRequest.run = watch, run
    summary = trainer.train(config_of(tree))
    return {"status": summary.status, "skipped": summary.last.get("skipped_steps")}


def train_with_a_spike(tree: dict[str, Any], step: int) -> dict[str, Any]:
    """Train, but at `step` rank 0's share of each micro-batch's loss is 30 larger: the other ranks must learn of it."""
    from potstill.student_train.run import loop, trainer

    honest = loop.note_micro_batch

    def note(run: Any, micro: Any, loss: torch.Tensor, sums: torch.Tensor) -> None:
        jump = 30.0 if run.state.step == step and run.topology.is_main else 0.0
        honest(run, micro, loss + jump, sums)

    loop.note_micro_batch = note
    summary = trainer.train(config_of(tree))
    return {"status": summary.status, "spikes": summary.last.get("loss_spikes")}


def _from_step(step: int, action: Callable[[], None]) -> None:
    """Have `action` take place once, right before the train loop's look at the ranks of `step`."""
    from potstill.student_train.run import loop

    honest = loop.agree

    def agree(run: Any, batch: Any) -> Any:
        answer = honest(run, batch)
        if run.state.step == step:
            action()
        return answer

    loop.agree = agree


def _told(tree: dict[str, Any]) -> str:
    """The error that ends the run, as its class and text."""
    from potstill.student_train.run import trainer

    try:
        return f"no error: {trainer.train(config_of(tree))}"
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def train_with_a_limit_on_files(tree: dict[str, Any], step: int, rank: int, num_bytes: int) -> str:
    """Train, but one rank may make no file larger than so many bytes from before `step` is trained, as by a quota."""

    def limit() -> None:
        if int(os.environ["RANK"]) == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    _from_step(step - 1, limit)
    return _told(tree)


def train_with_a_disk_full(tree: dict[str, Any], step: int, other: str) -> str:
    """Train, but before `step` is trained another file takes all that is left of the disk, byte for byte."""

    def fill() -> None:
        with open(other, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(512))

    _from_step(step - 1, fill)
    return _told(tree)


def watched_run(tree: dict[str, Any]) -> bytes:
    """Train alone, and keep what a metric line is made of: each step's weights, batches, loss settings and rows read.

    `steps`: (state of the model before the step, its micro-batches, its objective); `read`: per store, the row ids that
    the loader asked for; `head`: rows that went through the head's matrix product, per forward in training. Pickled, as
    tensors would be handed over as shared memory of a process that has ended.
    """
    from potstill.kernels import products
    from potstill.storage import StoreReader
    from potstill.student_train.model.student import StudentModel
    from potstill.student_train.run import loop, trainer

    steps: list[Any] = []
    read: dict[str, list[int]] = {}
    head: list[int] = []
    agree, rows, logits, forward = loop.agree, StoreReader.rows, products.logits, StudentModel.forward
    make_loader, is_training = trainer.Loader, [False]

    def watch_agree(run: Any, batch: Any) -> Any:
        state = {name: value.detach().clone() for name, value in run.engine.module.state_dict().items()}
        steps.append((state, batch.micros, run.plan.objective(run.state.step)))
        return agree(run, batch)

    def watch_rows(self: Any, ids: Any) -> Any:
        read.setdefault(self.url.rsplit("/", 1)[-1], []).extend(int(i) for i in ids)
        return rows(self, ids)

    def watch_loader(*args: Any, **options: Any) -> Any:
        StoreReader.rows = watch_rows
        return make_loader(*args, **options)

    def watch_forward(self: Any, *args: Any, **options: Any) -> Any:
        is_training[0] = self.training
        if self.training:
            head.append(0)
        return forward(self, *args, **options)

    def watch_logits(hidden: torch.Tensor, *args: Any, **options: Any) -> Any:
        if is_training[0] and head:
            head[-1] += hidden.shape[0]
        return logits(hidden, *args, **options)

    loop.agree, trainer.Loader, products.logits, StudentModel.forward = (
        watch_agree,
        watch_loader,
        watch_logits,
        watch_forward,
    )
    trainer.train(config_of(tree))
    return pickle.dumps({"steps": steps, "read": read, "head": head})


def _muon_values(shapes: list[list[int]], step: int) -> torch.Tensor:
    """Numbers [E] for the parameters of these shapes, laid end to end."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(sum(int(np.prod(shape)) for shape in shapes), generator=generator)


def muon_on_matrices(shapes: list[list[int]]) -> list[float]:
    """The parameters [E], flat, after three steps of Muon on whole matrices."""
    from potstill.student_train.run.muon import MuonWithAdamW

    sizes = [int(np.prod(shape)) for shape in shapes]
    pieces = zip(_muon_values(shapes, 0).split(sizes), shapes, strict=True)
    parameters = [torch.nn.Parameter(piece.reshape(shape).clone()) for piece, shape in pieces]
    group = {"params": parameters, "kind": "muon", "lr": 0.02, "weight_decay": 0.1}
    optimizer = MuonWithAdamW([group], momentum=0.95, adamw={})
    for step in (1, 2, 3):
        for parameter, piece in zip(parameters, _muon_values(shapes, step).split(sizes), strict=True):
            parameter.grad = piece.reshape(parameter.shape).clone()
        optimizer.step()
    return [value for parameter in parameters for value in parameter.detach().flatten().tolist()]


def muon_on_flat_parts(shapes: list[list[int]]) -> list[float]:
    """This rank's part of the same parameters, cut as ZeRO 1 does: end to end, filled up with zeros, equal parts."""
    from potstill.student_train.run import engine as dist
    from potstill.student_train.run.muon import FlatPart, MuonWithAdamW, places_of

    topology = dist.start_distributed()
    size = -(-len(_muon_values(shapes, 0)) // topology.world_size)

    def mine(step: int) -> torch.Tensor:
        values = torch.nn.functional.pad(_muon_values(shapes, step), (0, topology.world_size))
        return values[topology.rank * size : (topology.rank + 1) * size].clone()

    flat = torch.nn.Parameter(mine(0))
    group = {"params": [flat], "kind": "muon", "lr": 0.02, "weight_decay": 0.1}
    optimizer = MuonWithAdamW([group], momentum=0.95, adamw={})
    optimizer.parts[flat] = FlatPart(tuple(places_of(shapes)), topology.rank * size, topology.world_size)
    for step in (1, 2, 3):
        flat.grad = mine(step)
        optimizer.step()
    return flat.detach().tolist()


def train_with_new_state(tree: dict[str, Any]) -> None:
    """Train as a rank; where a stage restarts the optimizer its whole state is dropped, as of one just made."""
    from potstill.student_train.run import loop

    def drop(optimizer: Any) -> None:
        getattr(optimizer, "optimizer", optimizer).state.clear()

    loop.clear_optimizer = drop
    train_run(tree)


def train_and_count_passes(tree: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Train as a rank that shares arrays however small; passes that it made over the indexes of stores, the summary."""
    from potstill.storage.files import shared_arrays
    from potstill.storage.store.index import RowIndex

    shared_arrays.SHARED_FROM_BYTES = 1
    passes, real = [], RowIndex.columns

    def columns(self: RowIndex, names: Any) -> Any:
        passes.append(names)
        return real(self, names)

    RowIndex.columns = columns  # type: ignore[method-assign]
    summary = train_run(tree)
    return len(passes), summary
