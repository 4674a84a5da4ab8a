"""One rank that trains a tiny model whose experts or rows ranks share: RANK and WORLD_SIZE say which."""

import faulthandler
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_rows import MEDIA, TINY, row

from omniloom.data.loader import Batch
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder
from omniloom.model.moe import Experts
from omniloom.train.config import TrainingRun
from omniloom.train.groups import OptimizerConfig, ParallelConfig, TrainConfig

ROWS, STEPS = 4, 50
PATIENCE_S = 1000  # a collective waits half an hour: a rank that hangs ends itself
MODEL = ModelConfig(**vars(TINY) | {"n_routed_experts": 8, "num_attention_heads": 4, "initializer_range": 0.1})
Answer = dict[str, Any]
SOURCES = torch.tensor([1.0, 0.5])
# Which media a row holds, by row and step: no medium is always on one rank.
KINDS = [("image",), (), ("audio", "video"), ("video",), MEDIA]
# One step of it is one of gradient descent: every weight moves by its gradient.
DESCENT = OptimizerConfig(lr=1e4, eps=1e4, beta1=0.0, beta2=0.0, weight_decay=0.0)


def train(zero_stage: int, do: str, steps: int = STEPS, expert: int = 1, sequence: int = 1, **changes: Any) -> Answer:
    """Losses and norms of every step, and the weights at the end; the rows repeat every fifth step.

    `do` is train, or descend: one step of gradient descent.
    """
    import omniloom.train.engine as engines
    from omniloom.train.step import training_step

    ours = engines.deepspeed_config

    def partitioned(run: TrainingRun, ranks: int, parameters: int) -> dict[str, Any]:
        answer = ours(run, ranks, parameters)
        if zero_stage == 3:  # by default it keeps small parameters whole on every rank
            answer["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return answer

    engines.deepspeed_config = partitioned
    descends = do == "descend"
    steps, clipping = (1, 0.0) if descends else (steps, 1.0)
    config = TrainConfig(steps=steps, global_batch_size=ROWS, micro_batch_size=1, gradient_clipping=clipping, **changes)
    optimizer = DESCENT if descends else OptimizerConfig(lr=1e-2, eps=1e-4)
    run = TrainingRun(model=MODEL, train=config, optimizer=optimizer)
    run.parallel = ParallelConfig(zero_stage=zero_stage, expert=expert, sequence=sequence)
    torch.manual_seed(0)
    model = Decoder(MODEL)
    engine = engines.Engine(model, run)
    engines.deepspeed_config = ours
    told, counts = [], torch.zeros(2, MODEL.n_routed_experts)
    for step in range(steps):
        rows = [row(KINDS[(step + i) % len(KINDS)], 10 * (step % 5) + i) for i in range(ROWS)]
        share = ROWS // engine.replicas
        mine = [Batch([row]) for row in rows[engine.replica * share : (engine.replica + 1) * share]]
        result = training_step(engine, model, mine, SOURCES, run.train, 1.0)
        told.append([result.next_token, result.mtp, result.balance, result.grad_norm, result.tokens])
        counts += result.routing.choices_LE.float()
    held = sum(p.numel() for part in model.modules() if isinstance(part, Experts) for p in part.parameters())
    weights = {name: tensor.float() for name, tensor in engine.weights().items()}
    return {"told": told, "weights": weights, "counts": counts, "held": held}


def attention(sequence: int) -> Answer:
    """Attention of shared rows in every pattern, full heads of keys and few, against that of whole rows."""
    from omniloom.model.attention import attend
    from omniloom.model.position import find_places
    from omniloom.train.parallel import attend_by_heads, share_rows

    rows, answer = share_rows(torch.nn.Identity(), sequence), {}
    document = torch.tensor([[0] * 5 + [1] * 9 + [-1] * 2, [0] * 16])
    modality = torch.zeros_like(document)
    modality[1, 5:9] = 1
    position = torch.zeros(2, 16, 3, dtype=torch.int32)
    position[1, 5:9, 2] = torch.arange(4)
    for pattern, key_heads in product(("full", "sparse", "linear"), (4, 2, 1)):
        sizes = {"attention_pattern": pattern, "window_tokens": 4, "global_stride": 2, "media_bidirectional": True}
        config = ModelConfig(**vars(MODEL) | sizes)
        places = find_places(document, modality, position, config)
        torch.manual_seed(0)
        inputs = [torch.randn(2, 16, heads, 8) for heads in (4, key_heads, key_heads)]
        upstream = torch.randn(2, 16, 4, 8)
        whole = [x.clone().requires_grad_() for x in inputs]
        parts = [rows.cut(x).clone().requires_grad_() for x in inputs]
        expected = attend(*whole, places, 0.3, config)
        expected.backward(upstream)
        out = attend_by_heads(*parts, places, 0.3, config, group=rows._group)
        out.backward(rows.cut(upstream))
        torch.testing.assert_close(out, rows.cut(expected), rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(parts, whole, strict=True):
            torch.testing.assert_close(ours.grad, rows.cut(theirs.grad), rtol=1e-4, atol=1e-5)
        answer[f"{pattern} {key_heads}"] = out.detach()
    return answer


def dispatch(expert: int) -> Answer:
    """Shared experts on rows that all want the first expert, one rank's experts, or none, against all experts here."""
    from omniloom.train.parallel import share_experts, whole_weights

    answer: Answer = {}
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for case, (tokens, last) in {"even": (7, 8), "uneven": (3 + 5 * rank, 3), "one": (4, 1), "none": (0, 8)}.items():
        torch.manual_seed(1)
        whole = Experts(MODEL)
        for parameter in whole.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        torch.manual_seed(2 + rank)
        hidden = torch.randn(tokens, MODEL.hidden_size)
        gates, chosen = torch.rand(tokens, 2), torch.randint(last, (tokens, 2))
        upstream = torch.randn(tokens, MODEL.hidden_size)
        found = []
        shared = torch.nn.ModuleList([Experts(MODEL)])
        shared.load_state_dict({f"0.{name}": tensor for name, tensor in whole.state_dict().items()})
        share_experts(shared, expert, zero_stage=3)
        for ours, theirs in zip(shared.parameters(), whole.parameters(), strict=True):
            there = slice(ours.global_offset, ours.global_offset + ours.numel())
            assert ours.global_shape == theirs.shape
            assert torch.equal(ours.flatten(), theirs.flatten()[there])
        for experts in (whole, shared[0]):
            mine = [x.clone().requires_grad_() for x in (hidden, gates)]
            out = experts(*mine, chosen)
            out.backward(upstream)
            found.append([out, *(x.grad for x in mine)])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        for parameter in whole.parameters():
            dist.all_reduce(parameter.grad)
        everyone = [parameter.grad for parameter in whole.parameters()]
        with torch.no_grad():
            for parameter in shared.parameters():
                same = parameter.ds_zero_partition_process_group
                dist.all_reduce(parameter.grad, group=same)
                parameter.copy_(parameter.grad)
        joined = whole_weights(shared)
        for (name, gradient), expected in zip(joined.items(), everyone, strict=rank == 0):
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5, msg=f"{case} {name}")
        assert rank or len(joined) == 2
        answer[case] = tuple(everyone)
    assert ranks >= expert
    return answer


def main(folder: str, cases: list[dict[str, Any]]) -> None:
    from omniloom.train.engine import deepspeed  # it keeps DeepSpeed from compiling

    faulthandler.dump_traceback_later(PATIENCE_S, exit=True, file=sys.__stderr__)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    answers = []
    for case in cases:
        does = {"dispatch": dispatch, "attention": attention}
        if case["do"] in does:
            answers.append(does[case["do"]](**{key: value for key, value in case.items() if key != "do"}))
        else:
            answers.append(train(**case))
    if dist.get_rank() == 0:
        torch.save(answers, Path(folder, f"{dist.get_world_size()}.pt"))
    dist.barrier()
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
