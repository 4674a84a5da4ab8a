"""Sound and video files made on the spot."""

import io
import random
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

# container: encoder
SOUND_FORMATS = {"wav": "pcm_s16le", "flac": "flac", "mp3": "libmp3lame", "ogg": "libopus"}
VIDEO_FORMATS = {"mp4": "libx264", "matroska": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4"}


def tone(hertz: float, seconds: float, rate: int, amplitude: float = 0.5) -> np.ndarray:
    """A sine, float32 (S,)."""
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def speechlike(seconds: float, rate: int = 16_000, seed: int = 0) -> np.ndarray:
    """Noise under a slow envelope with a few tones, float32 (S,)."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    sound = 0.05 * generator.standard_normal(len(time))
    for hertz in (130, 700, 1_900):
        sound += 0.2 * np.sin(2 * np.pi * hertz * time) * np.sin(2 * np.pi * 3 * time) ** 2
    return sound.astype(np.float32)


def encode_sound(samples: np.ndarray, rate: int, container: str, codec: str | None = None) -> bytes:
    """Samples (S,) or (channels, S) in −1 … 1 as a file."""
    planes = np.atleast_2d(samples).astype(np.float32)
    layout = "mono" if len(planes) == 1 else "stereo"
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as output:
        track = output.add_stream(codec or SOUND_FORMATS[container], rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(planes), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        resampler = av.AudioResampler(track.codec_context.format, layout, rate, track.codec_context.frame_size or 1_024)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            output.mux(track.encode(part))
        output.mux(track.encode(None))
    return stream.getvalue()


def wav(samples: np.ndarray, rate: int, bits: int = 16, is_float: bool = False) -> bytes:
    """Samples (S,) or (channels, S) in −1 … 1 as a RIFF file written byte by byte."""
    planes = np.atleast_2d(samples)
    flat = planes.T.flatten()
    if is_float:
        data = flat.astype("<f4" if bits == 32 else "<f8").tobytes()
    elif bits == 8:
        data = (flat * 127 + 128).round().astype(np.uint8).tobytes()
    else:
        whole = (flat.astype(np.float64) * (2 ** (bits - 1) - 1)).round().astype("<i8")
        data = whole.view(np.uint8).reshape(-1, 8)[:, : bits // 8].tobytes()
    block = len(planes) * bits // 8
    head = struct.pack("<HHIIHH", 3 if is_float else 1, len(planes), rate, rate * block, block, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def shade(number: int) -> int:
    """The grey of frame `number`: neighbours differ by far more than a codec blurs."""
    return 20 + 37 * number % 211


def encode_video(
    times_ms: list[int],
    container: str = "mp4",
    size: tuple[int, int] = (32, 32),
    codec: str | None = None,
    pictures: list[np.ndarray] | None = None,
    **options: str,
) -> bytes:
    """A file with a frame at each time: the given pictures, or plain greys `shade(0)`, `shade(1)`, …"""
    width, height = size
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as output:
        track = output.add_stream(codec or VIDEO_FORMATS[container], rate=1_000, options=options)
        track.width, track.height = width, height
        track.pix_fmt = "yuv420p"
        track.time_base = track.codec_context.time_base = Fraction(1, 1_000)
        for number, time in enumerate(times_ms):
            grey = np.full((height, width, 3), shade(number), np.uint8)
            frame = av.VideoFrame.from_ndarray(grey if pictures is None else pictures[number], format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1_000)
            output.mux(track.encode(frame))
        output.mux(track.encode(None))
    return stream.getvalue()


def encode_film(
    seconds: float,
    sound: np.ndarray,
    rate: int,
    container: str = "matroska",
    codec: str = "pcm_s16le",
    sound_starts_ms: tuple[int, ...] = (0,),
) -> bytes:
    """Ten plain greys a second, `shade(0)`, `shade(1)`, …; the sound (S,) in as many even parts as it has starts."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as output:
        track = output.add_stream("mpeg4", rate=10)
        track.width = track.height = 32
        track.pix_fmt = "yuv420p"
        heard = output.add_stream(codec, rate=rate, layout="mono")
        for number in range(round(10 * seconds)):
            grey = np.full((32, 32, 3), shade(number), np.uint8)
            output.mux(track.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        output.mux(track.encode(None))
        for start, part in zip(sound_starts_ms, np.split(sound, len(sound_starts_ms)), strict=True):
            size = heard.codec_context.frame_size or 1_024
            for at in range(0, len(part), size):
                values = np.ascontiguousarray(part[None, at : at + size])
                frame = av.AudioFrame.from_ndarray(values, format="fltp", layout="mono")
                frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
                frame = av.AudioResampler(heard.codec_context.format, "mono", rate).resample(frame)[0]
                frame.pts, frame.time_base = start * rate // 1_000 + at, Fraction(1, rate)
                output.mux(heard.encode(frame))
        output.mux(heard.encode(None))
    return stream.getvalue()


def png_bytes(pixels: np.ndarray, kind: int, **chunks: bytes) -> bytes:
    """A PNG of pixels (H, W, channels) as uint8 or uint16; kind 0 is grey, 2 colour, 4 grey and alpha, 6 both."""
    bits = 8 * pixels.itemsize
    rows = b"".join(b"\0" + row.astype(f">u{pixels.itemsize}").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], bits, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *((name.encode(), body) for name, body in chunks.items())]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*part) for part in parts)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def damaged(data: bytes, generator: random.Random) -> bytes:
    """A few bits or bytes of a file changed, or a part of it cut off, doubled or left out."""
    bent = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 4, 16))):
        # Headers stand at the ends: half of the damage goes there.
        at = generator.randrange(min(len(bent), 400) if generator.random() < 0.5 else len(bent))
        at = len(bent) - 1 - at if generator.random() < 0.2 else at
        match generator.randrange(6):
            case 0 | 1:
                bent[at] ^= 1 << generator.randrange(8)
            case 2:
                bent[at] = generator.choice((0, 1, 127, 128, 255))
            case 3:
                bent[at : at + 4] = struct.pack("<I", generator.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF)))
            case 4:
                bent = bent[: max(at, 1)]
            case 5:
                until = at + generator.randrange(1, 200)
                bent[at:until] = bent[at:until] * generator.choice((0, 2)) or b"\0"
    return bytes(bent)


def large_png(side: int) -> bytes:
    """A grey picture of side² pixels in a file of a thousandth of that."""
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*part) for part in parts)


def png_video(png: bytes, side: int) -> bytes:
    """A mov file with one frame, the PNG as it stands."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mov") as output:
        track = output.add_stream("png", rate=1)
        track.width = track.height = side
        track.pix_fmt = "gray"
        packet = av.Packet(png)
        packet.stream, packet.pts, packet.dts, packet.time_base = track, 0, 0, Fraction(1, 1)
        output.mux(packet)
    return stream.getvalue()


def mp3_with_cover(png: bytes, sound: bytes) -> bytes:
    """An mp3 with a picture in its ID3 tag."""
    body = b"\0image/png\0\3\0" + png
    frame = b"APIC" + struct.pack(">I", len(body)) + b"\0\0" + body
    return b"ID3\3\0\0" + bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0)) + frame + sound


def reset_peak() -> int:
    """Let this process's peak memory count from now on; what it holds now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """The most memory this process has held, in bytes."""
    return 1_024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def peak_growth_bytes(reader: str, *files: Path, config: str) -> list[int]:
    """How far reading each file with e.g. `audio.read_audio` raises a fresh process's peak memory, in order."""
    code = f"""
import sys
from pathlib import Path
from omniloom.errors import DataError
from omniloom.modality import audio, config, image, video
from omniloom.modality.files import Media
audio._filters(16_000, 400, 80)
peak = lambda: 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
for file in sys.argv[1:]:
    before = peak()
    try:
        {reader}(Media(file, Path(file)), {config})
    except DataError:
        pass
    print(peak() - before)
"""
    ran = subprocess.run([sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True, check=True)
    return [int(line) for line in ran.stdout.split()]
