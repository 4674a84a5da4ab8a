"""Digits spoken by espeak-ng's synthetic voices, through its C library (the `demo` extra)."""

import ctypes
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from omniloom.errors import ConfigError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029")
UNVOICED = ("whisper", "whisperf")
SYNCHRONOUS, DO_NOT_EXIT, UTF8, RATE, PITCH = 2, 0x8000, 1, 1, 3  # espeak-ng's speak_lib.h
QUIET = 300  # of 32,767: what is trimmed at both ends
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Speaker:
    """espeak-ng in this process; the same calls in the same order give the same samples.

    Its Klatt voices breathe by the C library's `rand`, which whatever else lives in the process draws from as well;
    it is seeded before each clip.
    """

    def __init__(self, seed: int) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise ConfigError("samples=demo needs espeakng-loader: pip install 'omniloom[demo]'") from error
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._data = Path(espeakng_loader.get_data_path())
        self.sample_rate: int = self._library.espeak_Initialize(SYNCHRONOUS, 0, str(self._data).encode(), DO_NOT_EXIT)
        if self.sample_rate <= 0:
            raise ConfigError(f"espeak-ng cannot start with its data at {self._data}")
        self._seed, self._c = seed, ctypes.CDLL(None)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        self._heard: list[np.ndarray] = []
        self._callback = CALLBACK(self._hear)  # kept: the library holds only its address
        self._library.espeak_SetSynthCallback(self._callback)

    def voices(self) -> list[str]:
        """The voiced speakers it has, by name. An unknown name is accepted in silence, so only these are used."""
        return sorted(path.name for path in (self._data / "voices" / "!v").iterdir() if path.name not in UNVOICED)

    def say(self, text: str, voice: str, accent: str, words_per_minute: int, pitch: int) -> np.ndarray:
        """Speak `text`; int16 (S,), trimmed at both ends."""
        self._library.espeak_SetVoiceByName(f"{accent}+{voice}".encode())
        self._library.espeak_SetParameter(RATE, words_per_minute, 0)
        self._library.espeak_SetParameter(PITCH, pitch, 0)
        self._heard.clear()
        self._c.srand(ctypes.c_uint(self._seed))
        said = text.encode()
        self._library.espeak_Synth(said, ctypes.c_size_t(len(said) + 1), 0, 0, 0, UTF8, None, None)
        self._library.espeak_Synchronize()
        samples = np.concatenate(self._heard) if self._heard else np.zeros(0, np.int16)
        loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > QUIET)
        return samples[loud[0] : loud[-1] + 1] if len(loud) else samples[:0]

    def _hear(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, _events: int | None) -> int:
        if samples and count:
            self._heard.append(np.ctypeslib.as_array(samples, (count,)).copy())  # the library reuses its buffer
        return 0


def spoken_digits(speaker: Speaker, voices: list[str], takes: int, seed: int) -> Iterator[tuple[str, int, np.ndarray]]:
    """(voice, digit, samples), `takes` of each, with accent, speed and pitch drawn anew."""
    generator = random.Random(seed)
    for voice in voices:
        for digit, word in enumerate(WORDS):
            for _ in range(takes):
                accent, speed, pitch = (
                    generator.choice(ACCENTS),
                    generator.randint(130, 210),
                    generator.randint(30, 70),
                )
                samples = speaker.say(word, voice, accent, speed, pitch)
                if len(samples) > speaker.sample_rate // 20:
                    yield voice, digit, samples
