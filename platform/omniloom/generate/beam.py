"""Beam search: the likeliest answers, several kept alive side by side.

B beams, V vocabulary.
"""

import torch

from omniloom.errors import ConfigError
from omniloom.generate.config import CacheConfig
from omniloom.generate.forward import Piece, forward, read
from omniloom.generate.kv_cache import KVCache
from omniloom.generate.request import Answer, Request
from omniloom.generate.sampling import log_shares
from omniloom.modality.text import TextTokenizer
from omniloom.model.decoder import Decoder


def search(
    decoder: Decoder, text: TextTokenizer, request: Request, cache: CacheConfig, prefill_tokens: int = 2_048
) -> list[Answer]:
    """The answers of the `beams` best scores found, best first; score = Σ log p / length^penalty, eos counted.

    Wu et al. 2016, eq. 14, with the length itself.

    At each step every live beam's every next token competes; of the best 2·B those that end are done, the B best others
    live on. It ends at max_new_tokens, or when no live beam can still beat the worst of B done ones. Raises ConfigError
    where the context has no room.
    """
    decoding = request.decoding
    width, penalty = decoding.beams or 1, decoding.length_penalty
    room = decoder.config.max_position_embeddings - len(request.prompt)
    if room < 1:
        raise ConfigError(
            f"a prompt of {len(request.prompt):,} tokens leaves no room in the model's context: "
            f"model.max_position_embeddings={decoder.config.max_position_embeddings:,}"
        )
    longest = min(decoding.max_new_tokens, room)
    kv, done = KVCache(decoder, cache, width), []
    log_BV = log_shares(read(decoder, kv, 0, request.prompt, prefill_tokens)[None])[0]
    live = [Answer(prompt_tokens=len(request.prompt))]

    def score(answer: Answer) -> float:
        return answer.score / len(answer.ids) ** penalty

    for length in range(1, longest + 1):
        summed_BV = log_BV + log_BV.new_tensor([beam.score for beam in live])[:, None]
        entropies = -(log_BV.exp() * log_BV).sum(-1)
        best = summed_BV.flatten().topk(min(2 * width, summed_BV.numel())).indices.tolist()
        going: list[tuple[int, Answer]] = []
        for at in best:
            row, id = divmod(at, log_BV.shape[1])
            one = live[row]
            next_one = Answer(
                [*one.ids, id], [*one.logprobs, float(log_BV[row, id])], [*one.entropies, float(entropies[row])],
                prompt_tokens=one.prompt_tokens,
            )  # fmt: skip
            if id == text.eos_id and not decoding.ignore_eos:
                next_one.finish = "eos"
                done.append(next_one)
            elif decoding.stop and any(stop in text.decode(next_one.ids) for stop in decoding.stop):
                next_one.finish = "stop"
                done.append(next_one)
            elif len(going) < width:
                going.append((row, next_one))
        done = sorted(done, key=score, reverse=True)[:width]
        if length == longest or not going:
            break
        # The sum only falls; a longer length helps it where the penalty is above 0.
        reach = longest if penalty > 0 else length + 1
        if len(done) == width and max(one.score for _, one in going) / reach**penalty <= score(done[-1]):
            going = []
            break
        live = [one for _, one in going]
        kv.reorder(0, [row for row, _ in going])
        passed = forward(decoder, kv, [Piece(row, one.ids[-1:]) for row, one in enumerate(live)])
        for row in range(len(live)):
            kv.settle(row)
        log_BV = log_shares(torch.cat(passed.logits))[0]
    for _, one in going:
        one.finish = "length"
    answers = sorted([*done, *(one for _, one in going)], key=score, reverse=True)[:width]
    for answer in answers:
        whole = text.decode(answer.ids)
        found = [at for stop in decoding.stop if (at := whole.find(stop)) >= 0]
        answer.text = whole[: min(found)] if found else whole
    return answers
