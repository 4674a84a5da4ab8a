"""Beam search: the likeliest answers, several kept alive side by side.

B beams, V vocabulary.
"""

import torch

from omniloom.generate.config import CacheConfig
from omniloom.generate.forward import Piece, forward, read
from omniloom.generate.kv_cache import KVCache
from omniloom.generate.request import Answer, Request, first_stop, refuse_no_room
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
    context = decoder.config.max_position_embeddings
    refuse_no_room(request.prompt, context)
    longest = min(decoding.max_new_tokens, context - len(request.prompt))
    kv, done = KVCache(decoder, cache, width), []
    log_BV, entropy_B = log_shares(read(decoder, kv, 0, request.prompt, prefill_tokens)[None])
    live = [Answer(prompt_tokens=len(request.prompt))]

    def score(answer: Answer) -> float:
        return answer.score / len(answer.ids) ** penalty

    for length in range(1, longest + 1):
        summed_BV = log_BV + log_BV.new_tensor([beam.score for beam in live])[:, None]
        best = summed_BV.flatten().topk(min(2 * width, summed_BV.numel())).indices.tolist()
        going: list[tuple[int, Answer]] = []
        for at in best:
            row, id = divmod(at, log_BV.shape[1])
            one = live[row]
            next_one = Answer(
                [*one.ids, id], [*one.logprobs, float(log_BV[row, id])], [*one.entropies, float(entropy_B[row])],
                prompt_tokens=one.prompt_tokens,
            )  # fmt: skip
            if id == text.eos_id and not decoding.ignore_eos:
                next_one.finish = "eos"
                done.append(next_one)
            elif decoding.stop and first_stop(text.decode(next_one.ids), decoding.stop) is not None:
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
        log_BV, entropy_B = log_shares(torch.cat(passed.logits))
    for _, one in going:
        one.finish = "length"
    answers = sorted([*done, *(one for _, one in going)], key=score, reverse=True)[:width]
    for answer in answers:
        whole = text.decode(answer.ids)
        answer.text = whole[: first_stop(whole, decoding.stop)]
    return answers
