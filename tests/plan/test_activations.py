"""What a forward pass keeps, against the storages that autograd saves of it."""

from dataclasses import replace

import pytest
import torch
from test_params import preset
from torch import Tensor

from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder, text_fields
from omniloom.objective.balance import sequence_balance
from omniloom.objective.next_token import next_token_nll
from omniloom.plan.activations import Numerics, encoder_bytes, ends_bytes, head_bytes, layer_bytes

ROWS, TOKENS = 2, 61  # no weight has either in its shape
PARAMETERS = {"fp32": torch.float32, "bf16_autocast": torch.float32, "bf16": torch.bfloat16}
TEXT = {"image_patch_pixels": None, "video_patch_pixels": None, "audio_mels": None}


def kept_bytes(
    config: ModelConfig, precision: str, tokens: int = TOKENS, media: dict[str, Tensor] | None = None
) -> int:
    """Bytes of all storages that autograd saves from the embedding to the loss, weights and their casts aside."""
    torch.manual_seed(0)
    decoder = Decoder(config).to(PARAMETERS[precision])
    fields = text_fields(torch.randint(0, config.vocab_size, (ROWS, tokens)), config) | (media or {})
    everywhere = torch.ones(ROWS, tokens, dtype=torch.bool)
    weights = {(p.numel(), *p.shape[::-1]) for p in decoder.parameters()} | {
        (p.numel(), *p.shape) for p in decoder.parameters()
    }
    own = {p.untyped_storage().data_ptr() for p in [*decoder.parameters(), *decoder.buffers()]}
    kept: dict[int, tuple[int, Tensor]] = {}  # the tensors too, so that no address is used twice

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        is_weight = storage.data_ptr() in own or (tensor.numel(), *tensor.shape) in weights
        if not is_weight and storage.data_ptr():
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_autocast"),
    ):
        depths = config.num_nextn_predict_layers
        output = decoder(**fields, predict_at=everywhere, predict_ahead_at=[everywhere] * depths)
        targets = torch.zeros(ROWS * tokens, dtype=torch.long)
        losses = [next_token_nll(logits, targets).sum() for logits in (output.logits, *output.mtp)]
        for router in output.router:
            losses.append(sequence_balance(router.scores_BTE, fields["document"], config.num_experts_per_tok))
        torch.stack(losses).sum()
    return sum(size for size, _ in kept.values())


def predicted_bytes(config: ModelConfig, precision: str, tokens: int = TOKENS) -> float:
    numerics = Numerics(precision, on_cpu=True)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    a_token = sum(layer_bytes(config, layer, numerics) for layer in range(layers))
    return ROWS * tokens * (a_token + ends_bytes(config, numerics) + head_bytes(config, numerics).kept)


@pytest.mark.parametrize("precision", PARAMETERS)
@pytest.mark.parametrize(
    "name", ["tiny", "tiny_gpt", "tiny_llama", "tiny_mixtral", "tiny_deepseek", "tiny_claude", "gpt_relu"]
)
def test_what_is_kept_is_what_autograd_saves(name: str, precision: str) -> None:
    config = replace(preset(name.replace("relu", "").replace("gpt_", "tiny_gpt")), **TEXT)
    if name == "gpt_relu":
        config = replace(config, activation="relu")
    measured, predicted = kept_bytes(config, precision), predicted_bytes(config, precision)
    assert predicted == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(("pattern", "within"), [("sparse", 0.02), ("linear", 0.12)])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_deepseek"])
def test_the_other_patterns_of_attention(name: str, pattern: str, within: float) -> None:
    config = replace(preset(name), **TEXT, attention_pattern=pattern, window_tokens=64, global_stride=16)
    tokens = 5 * 61
    assert predicted_bytes(config, "fp32", tokens) == pytest.approx(kept_bytes(config, "fp32", tokens), rel=within)


@pytest.mark.parametrize("medium", ["image", "video"])
def test_a_patchs_encoder_keeps_the_patch_and_its_norm(medium: str) -> None:
    config = replace(preset("tiny_omni"), attention_pattern="full", media_bidirectional=False)
    patches = 31
    modality = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    modality[0, :patches] = {"image": 1, "video": 3}[medium]
    width = config.widths[0]
    media = {"modality": modality, medium: torch.zeros(patches, width, dtype=torch.uint8)}
    more = kept_bytes(config, "fp32", media=media) - kept_bytes(config, "fp32")
    assert more == pytest.approx(patches * encoder_bytes(config, Numerics("fp32", on_cpu=True))[medium], rel=0.02)


def test_a_sounds_encoder_keeps_each_convolutions_frames() -> None:
    config = replace(preset("tiny_omni"), attention_pattern="full", media_bidirectional=False)
    heard = 24
    frames = heard * config.audio_frames_per_token
    modality = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    modality[0, :heard] = 2
    audio = torch.zeros(frames, config.audio_mels, dtype=torch.float16)
    media = {"modality": modality, "audio": audio, "audio_frames": torch.tensor([frames], dtype=torch.int32)}
    more = kept_bytes(config, "fp32", media=media) - kept_bytes(config, "fp32")
    assert more == pytest.approx(heard * encoder_bytes(config, Numerics("fp32", on_cpu=True))["audio"], rel=0.05)
