"""A small model whose loss is the fused head op, trained one step on ranks of a ZeRO stage or alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from potstill.kernels.loss import linear_sparse_loss
from tests.kernels.reference import make_targets

VOCAB, WIDTH, TOKENS = 61, 12, 16
LR = 0.5


class Model(nn.Module):
    """Embedding, one layer, head and loss in one forward, as ZeRO-3 needs it: the head is whole only there."""

    def __init__(self, *, tied: bool, checkpoint: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=not tied)
        self.checkpoint = checkpoint
        if tied:
            self.head.weight = self.embedding.weight

    def backbone(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embedding(tokens)))

    def loss_of(self, hidden: Tensor, batch: dict, normalizer: Tensor) -> Tensor:
        loss, _ = linear_sparse_loss(
            hidden=hidden,
            weight=self.head.weight,
            bias=self.head.bias,
            targets=batch["targets"],
            labels=batch["labels"],
            token_weights=batch["weights"],
            normalizer=normalizer,
            alpha=0.6,
            temperature=2.0,
            chunk_bytes=3 * 4 * VOCAB,
        )
        return loss

    def forward(self, batch: dict, normalizer: Tensor) -> Tensor:
        if self.checkpoint:
            from torch.utils.checkpoint import checkpoint

            hidden = checkpoint(self.backbone, batch["tokens"], use_reentrant=False)
            return checkpoint(self.loss_of, hidden, batch, normalizer, use_reentrant=False)
        return self.loss_of(self.backbone(batch["tokens"]), batch, normalizer)


def build(*, tied: bool, checkpoint: bool = False) -> Model:
    torch.manual_seed(0)
    return Model(tied=tied, checkpoint=checkpoint)


def whole_batch() -> dict:
    """TOKENS tokens; the second half has few weights, so that two ranks run different numbers of chunks."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(TOKENS, generator=generator) + 0.5
    weights[TOKENS // 2 + 2 :] = 0.0
    return {
        "tokens": torch.randint(0, VOCAB, (TOKENS,), generator=generator),
        "labels": torch.randint(0, VOCAB, (TOKENS,), generator=generator),
        "weights": weights,
        "targets": make_targets(TOKENS, VOCAB, [6, 0, 9]),
    }


def part_of(batch: dict, index: Tensor) -> dict:
    return {
        "targets": batch["targets"].select(index),
        **{name: batch[name][index] for name in ("tokens", "labels", "weights")},
    }


def step_alone(tied: bool) -> dict[str, Tensor]:
    """Parameters after one SGD step on the whole batch."""
    model, batch = build(tied=tied), whole_batch()
    model(batch, batch["weights"].sum()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= LR * parameter.grad
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def step_on_rank(stage: int, tied: bool) -> dict[str, np.ndarray]:
    """The same step on this rank's half of the batch under ZeRO `stage`; the whole parameters after it.

    As arrays: a tensor on a queue lives in shared memory of a process that may be gone when it is read.
    """
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}  # CPU: no build of the shared-memory op
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = build(tied=tied)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    config = {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,  # DeepSpeed 0.19 clips at 1.0 when nothing is said
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    batch = whole_batch()
    share = torch.arange(TOKENS).chunk(world)[rank]
    # DeepSpeed averages gradients over the ranks, so each takes `world` times its part of the sum.
    normalizer = batch["weights"].sum() / world
    engine.backward(engine(part_of(batch, share), normalizer))
    engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
