"""The encoders of pictures, sound and video against torch's own modules, clip by clip."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniloom.model.embedding import MEDIA_SCALE, AudioEncoder, PatchEncoder, StridedConvolution
from tiny_decoders import MELS, enliven, tiny_config

LENGTHS = [1, 2, 3, 4, 5, 7, 100, 1, 6]
EPS = 1e-6


def frames_of(lengths: list[int], channels: int = MELS, seed: int = 1) -> Tensor:
    return torch.randn(sum(lengths), channels, generator=torch.Generator().manual_seed(seed)) * 3 - 4


def times(counts: list[int]) -> Tensor:
    """Positions (t, 0, 0) of clips of so many tokens."""
    token = torch.tensor([t for count in counts for t in range(count)], dtype=torch.int32)
    return torch.stack([token, 0 * token, 0 * token], dim=1)


def tokens_of(lengths: list[int], per_token: int) -> list[int]:
    return [math.ceil(length / per_token) for length in lengths]


def conv1d(weight_DF: Tensor, channels: int) -> nn.Conv1d:
    """The linear map over three frames, laid out (frame, channel), as torch's convolution."""
    module = nn.Conv1d(channels, len(weight_DF), kernel_size=3, stride=2, padding=1, bias=False)
    module.weight.data = weight_DF.detach().unflatten(1, (3, channels)).transpose(1, 2).contiguous()
    return module


def test_the_strided_convolution_equals_torchs_run_clip_by_clip():
    ours = StridedConvolution(MELS, 8)
    enliven(ours)
    theirs = conv1d(ours.proj.weight, MELS)
    frames = frames_of(LENGTHS).requires_grad_()
    out, counts = ours(frames, torch.tensor(LENGTHS))
    twin = frames.detach().clone().requires_grad_()
    expected = [theirs(clip.T[None])[0].T for clip in twin.split(LENGTHS)]
    assert counts.tolist() == [len(clip) for clip in expected] == tokens_of(LENGTHS, 2)
    torch.testing.assert_close(out, torch.cat(expected), atol=1e-5, rtol=1e-5)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    out.backward(upstream)
    torch.cat(expected).backward(upstream)
    torch.testing.assert_close(frames.grad, twin.grad, atol=1e-5, rtol=1e-5)
    gradient = theirs.weight.grad.transpose(1, 2).flatten(1)
    torch.testing.assert_close(ours.proj.weight.grad, gradient, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[], [1], [0], [3, 0, 2]])
def test_the_strided_convolution_takes_no_clip_and_clips_without_a_frame(lengths):
    module = StridedConvolution(MELS, 8)
    out, counts = module(frames_of(lengths), torch.tensor(lengths, dtype=torch.long))
    assert counts.tolist() == tokens_of(lengths, 2)
    assert out.shape == (sum(counts.tolist()), 8)
    out.sum().backward()
    assert module.proj.weight.grad is not None


def tiny_audio(per_token: int) -> AudioEncoder:
    encoder = AudioEncoder(tiny_config(audio_frames_per_token=per_token), MELS)
    enliven(encoder)
    encoder.scale = 1.0
    return encoder


@pytest.mark.parametrize("per_token", [2, 4, 8])
@torch.no_grad()
def test_the_audio_encoder_equals_torchs_convolutions_run_clip_by_clip(per_token):
    encoder, frames, counts = tiny_audio(per_token), frames_of(LENGTHS), tokens_of(LENGTHS, per_token)
    out = encoder(frames.half(), torch.tensor(LENGTHS, dtype=torch.int32), times(counts))
    expected = []
    for clip in frames.half().float().split(LENGTHS):
        hidden = ((clip + 4) / 4).T[None]
        for i, (convolution, norm) in enumerate(zip(encoder.convolutions, encoder.norms, strict=True)):
            channels = hidden.shape[1]
            hidden = conv1d(convolution.proj.weight, channels)(F.gelu(hidden) if i else hidden)
            hidden = F.rms_norm(hidden.transpose(1, 2), (32,), norm.weight, EPS).transpose(1, 2)
        for t, token in enumerate(hidden[0].T):
            angle = [t * 10_000 ** (-i / 16) for i in range(16)]
            expected.append(token + torch.tensor([*map(math.sin, angle), *map(math.cos, angle)]))
    assert len(encoder.convolutions) == math.log2(per_token)
    assert len(out) == sum(counts)
    torch.testing.assert_close(out, torch.stack(expected), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("per_token", [2, 4, 8, 16])
@torch.no_grad()
def test_a_clip_of_any_length_gives_one_token_for_each_begun_group_of_frames(per_token):
    encoder = tiny_audio(per_token)
    for length in range(1, 70):
        count = -(-length // per_token)
        assert encoder(frames_of([length]), torch.tensor([length]), times([count])).shape == (count, 32), length


@torch.no_grad()
def test_clips_never_mix():
    encoder, counts = tiny_audio(4), tokens_of(LENGTHS, 4)
    lengths, frames = torch.tensor(LENGTHS), frames_of(LENGTHS)
    before = encoder(frames, lengths, times(counts)).split(counts)
    for changed in range(len(LENGTHS)):
        other = [clip + 5.0 * (i == changed) for i, clip in enumerate(frames.split(LENGTHS))]
        after = encoder(torch.cat(other), lengths, times(counts)).split(counts)
        same = [torch.equal(old, new) for old, new in zip(before, after, strict=True)]
        assert same == [i != changed for i in range(len(LENGTHS))]


@pytest.mark.parametrize("axes", [2, 3])
@torch.no_grad()
def test_the_patch_encoder_equals_a_literal_loop(axes):
    config = tiny_config()
    encoder = PatchEncoder(config, patch_pixels=2, axes=axes)
    enliven(encoder)
    generator = torch.Generator().manual_seed(3)
    patches = torch.randint(0, 256, (5, 12), generator=generator, dtype=torch.uint8)
    position = torch.randint(0, 30, (5, 3), generator=generator, dtype=torch.int32)
    out = encoder(patches, position)
    weight, gain = encoder.patch_proj.weight.double(), encoder.norm.weight.double()
    count = 32 // (2 * axes)
    for n in range(5):
        projected = weight @ (patches[n].double() / 127.5 - 1)
        normed = gain * projected / math.sqrt(float(projected.square().mean()) + EPS)
        encoding: list[float] = []
        for place in position[n, 3 - axes :].tolist():
            angle = [place * 10_000 ** (-i / count) for i in range(count)]
            encoding += [*map(math.sin, angle), *map(math.cos, angle)]
        encoding += [0.0] * (32 - len(encoding))
        expected = MEDIA_SCALE * (normed + torch.tensor(encoding, dtype=torch.float64))
        torch.testing.assert_close(out[n].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoders_run_on_nothing_and_give_every_parameter_a_zero_gradient(dtype):
    nowhere, no_clip = torch.zeros(0, 3, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    audio = tiny_audio(4).to(dtype)
    patches = PatchEncoder(tiny_config(), 2, axes=3).to(dtype)
    outs = [
        audio(torch.zeros(0, MELS, dtype=torch.float16), no_clip, nowhere),
        patches(torch.zeros(0, 12, dtype=torch.uint8), nowhere),
    ]
    for out in outs:
        assert out.shape == (0, 32)
        assert out.dtype == dtype
        out.sum().backward()
    for parameter in (*audio.parameters(), *patches.parameters()):
        assert parameter.grad is not None
        assert not parameter.grad.any()
