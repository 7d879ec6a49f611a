"""Voices as spectrograms: WAV files in a folder a speaker, or speakers that espeak-ng synthesises; speaker = identity.

A sample is a log-mel spectrogram [bands, frames] of the second in which most is said, with mean 0 and deviation 1, so
that loudness says nothing. Axes: T samples of sound, F frames, K bins of the Fourier transform, M bands.
"""

import io
import re
import shutil
import subprocess
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product

import numpy as np
from numpy.typing import NDArray

from trainer.data.arrays import as_payload
from trainer.data.image import MAX_BYTES
from trainer.data.importers import (
    Entry,
    HeldOut,
    Importer,
    ImportOptions,
    Listing,
    Progress,
    Read,
    share_held_out,
)
from trainer.data.importers.folder import list_folder, read_folder
from trainer.errors import UserError

BANDS, FRAMES = 40, 100
WINDOW, HOP = 0.025, 0.010  # seconds
LOWEST, HIGHEST = 60.0, 7600.0  # Hz
FEWEST_RATE, MOST_RATE = 16_000, 192_000
_WIDTHS = {1: "u1", 2: "<i2", 4: "<i4"}  # bytes of a sample; three are read, too
_TOGETHER = 1000  # windows that are transformed at a time
_SILENT = 1e-8  # of the loudest power: silence between words is not minus infinity
_PARAMETERS = (
    f"log of {BANDS} mel bands from {LOWEST:g} to {HIGHEST:g} Hz, {FRAMES} windows of {1000 * WINDOW:g} ms, one each "
    f"{1000 * HOP:g} ms, mean 0 and deviation 1"
)

# Speakers of espeak-ng are its variants, each with heights of voice; what varies within one is what is said, how fast,
# and a little how high.
HEIGHTS = (10, 50, 90)
UTTERANCES = 12
_JITTER, _SPEEDS = 3, (140, 200)  # of the height; words a minute
_ALIKE = 0.985  # correlation of two variants that say the same, above which they count as one
_LEAST_VARIANTS = 20
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_VARIANT = re.compile(r"!v/([A-Za-z0-9_-]+)")


def list_speech(source: str | None, options: ImportOptions, progress: Progress) -> Listing:
    """Every folder below `source` that holds files is a speaker; without `source` they are synthesised.

    Of synthesised ones whole variants are held out: no held-out voice is one of the training's at another height.

    Raises:
        UserError: as `list_folder`; or espeak-ng is not installed, or knows too few variants.
    """
    listing = _synthesised(options) if source is None else list_folder(source, options, progress)
    listing.content, listing.shape = "spectrogram", (BANDS, FRAMES)
    listing.provenance["spectrogram"] = _PARAMETERS
    return listing


def read_speech(source: str, options: ImportOptions) -> Read:
    """Reads a WAV file by its path below `source`, or has a place of `_synthesised` spoken."""
    sound = read_folder(source, options) if source else partial(_speak, seed=options.seed)
    return lambda place: as_payload(log_mel(sound(place)).astype(np.float16))


IMPORTER = Importer(list_speech, read_speech)


def log_mel(data: bytes) -> NDArray[np.float32]:
    """The spectrogram [BANDS, FRAMES] of a WAV file: what the model of such a data set reads, clients' included.

    Of a longer one the second with most of its energy counts, a shorter one is repeated. The loudness of all channels
    is taken together.

    Raises:
        UserError: no WAV of plain numbers, too large, a rate below 16,000 Hz, or nothing to be heard.
    """
    sound = _sound(data)
    size, rate = round(WINDOW * sound.rate), sound.rate
    count = max(1, 1 + int((len(sound.pressure_T) - size) / (HOP * rate)))
    starts_F = np.round(np.arange(count) * HOP * rate).astype(np.int64)
    padded_T = np.pad(sound.pressure_T, (0, max(0, int(starts_F[-1]) + size - len(sound.pressure_T))))
    parts = range(0, count, _TOGETHER)
    power_FM = _loudest(np.concatenate([_power(padded_T, starts_F[at : at + _TOGETHER], size, rate) for at in parts]))
    if not power_FM.max() > 0:
        raise UserError("it is silent in the bands of speech; leave it out")
    log_FM = np.log(power_FM + _SILENT * power_FM.max())
    return np.asarray(((log_FM - log_FM.mean()) / max(float(log_FM.std()), 1e-6)).T, np.float32)


def _power(pressure_T: NDArray[np.float64], starts_f: NDArray[np.int64], size: int, rate: int) -> NDArray[np.float64]:
    """Of some windows, in each band."""
    frames_fT = pressure_T[starts_f[:, None] + np.arange(size)] * np.hanning(size)
    power_fK = np.square(np.abs(np.fft.rfft(frames_fT, n=1 << (size - 1).bit_length())))
    return np.asarray(power_fK @ _filters(rate, power_fK.shape[1]).T)


def _loudest(power_FM: NDArray[np.float64]) -> NDArray[np.float64]:
    """The FRAMES frames in a row with most energy; fewer are repeated."""
    if len(power_FM) <= FRAMES:
        return np.asarray(np.resize(power_FM, (FRAMES, power_FM.shape[1])))
    until_F = np.concatenate([[0.0], np.cumsum(power_FM.sum(axis=1))])
    start = int(np.argmax(until_F[FRAMES:] - until_F[:-FRAMES]))
    return power_FM[start : start + FRAMES]


@lru_cache(8)
def _filters(rate: int, bins: int) -> NDArray[np.float64]:
    """Triangles that overlap by half, evenly spaced in mel = 2595 log10(1 + Hz / 700) (O'Shaughnessy 1987): [M, K]."""
    low, high = 2595 * np.log10(1 + np.array([LOWEST, HIGHEST]) / 700)
    edges = 700 * (10 ** (np.linspace(low, high, BANDS + 2) / 2595) - 1)
    hertz_K = np.arange(bins) * rate / (2 * (bins - 1))
    rising_MK = (hertz_K - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling_MK = (edges[2:, None] - hertz_K) / np.diff(edges)[1:, None]
    return np.asarray(np.maximum(0, np.minimum(rising_MK, falling_MK)))


@dataclass(frozen=True, slots=True)
class _Sound:
    rate: int
    pressure_T: NDArray[np.float64]


def _sound(data: bytes) -> _Sound:
    if len(data) > MAX_BYTES:
        raise UserError(f"it has {len(data)} bytes; at most {MAX_BYTES} are read: cut it into shorter ones")
    try:
        with wave.open(io.BytesIO(data)) as file:
            rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"it is no WAV file of whole numbers (PCM): {error or 'it is cut off'}; convert it") from error
    if width not in (*_WIDTHS, 3):
        raise UserError(f"it has {width} bytes a sample; allowed are 1 to 4: convert it")
    if not FEWEST_RATE <= rate <= MOST_RATE:
        raise UserError(f"it has {rate} samples a second; allowed are {FEWEST_RATE} to {MOST_RATE}: record it anew")
    if width == 3:  # 24 bits: numpy has no such type
        bytes_T4 = np.zeros((len(raw) // 3, 4), np.uint8)
        bytes_T4[:, 1:] = np.frombuffer(raw[: len(raw) // 3 * 3], np.uint8).reshape(-1, 3)
        values = bytes_T4.reshape(-1).view("<i4").astype(np.float64)
    else:
        values = np.frombuffer(raw[: len(raw) // width * width], _WIDTHS[width]).astype(float)
    whole = values[: len(values) // channels * channels].reshape(-1, channels).mean(axis=1)
    if not len(whole):
        raise UserError("it holds no sound; leave it out")
    return _Sound(rate, whole - whole.mean())


def _synthesised(options: ImportOptions) -> Listing:
    variants = _distinct(sorted(set(_VARIANT.findall(_espeak("--voices=variant").decode()))))
    if len(variants) < _LEAST_VARIANTS:
        raise UserError(f"espeak-ng knows {len(variants)} variants of voice; {_LEAST_VARIANTS} are needed: install all")
    return Listing(
        entries=_speakers(variants),
        source="",
        held_out=partial(_whole_variants, share_held_out(options.holdout_share, options.seed)),
        provenance={"source": " ".join(_espeak("--version").decode().split()[:4])},
        drop_duplicates=True,
    )


def _distinct(variants: list[str]) -> list[str]:
    """Those that sound unlike all before them: some have two names, or differ in a few percent of one formant."""
    kept: dict[str, NDArray[np.float32]] = {}
    for variant in variants:
        sound = log_mel(_say(variant, HEIGHTS[1], _SPEEDS[0], _WORDS[:5]))
        if all(float((sound * other).mean()) < _ALIKE for other in kept.values()):
            kept[variant] = sound
    return list(kept)


def _speakers(variants: list[str]) -> Iterator[Entry]:
    for variant, height in product(variants, HEIGHTS):
        for number in range(UTTERANCES):
            place = f"{variant}/{height}/{number:02d}"
            yield Entry(f"{variant}/{height}", place, place)


def _whole_variants(choose: HeldOut, speakers: Sequence[str]) -> list[int]:
    variant_of = [speaker.partition("/")[0] for speaker in speakers]
    variants = sorted(set(variant_of))
    chosen = {variants[number] for number in choose(variants)}
    return [number for number, variant in enumerate(variant_of) if variant in chosen]


def _speak(place: str, seed: int) -> bytes:
    """The WAV file of a place; what is said depends on it and the seed alone."""
    variant, height, _ = place.split("/")
    generator = np.random.default_rng([seed, *place.encode()])
    words = generator.choice(_WORDS, size=5).tolist()
    higher, speed = int(generator.integers(-_JITTER, _JITTER + 1)), int(generator.integers(*_SPEEDS))
    return _say(variant, int(height) + higher, speed, words)


def _say(variant: str, height: int, speed: int, words: Sequence[str]) -> bytes:
    return _espeak("--stdout", "-v", f"en-us+{variant}", "-p", str(height), "-s", str(speed), " ".join(words))


def _espeak(*options: str) -> bytes:
    program = shutil.which("espeak-ng")
    if program is None:
        raise UserError(
            "--kind speech without a SOURCE has voices synthesised by espeak-ng, which is not installed; "
            "run apt-get install espeak-ng, or name a folder of WAV files"
        )
    done = subprocess.run([program, *options], capture_output=True, check=False)
    if done.returncode or not done.stdout:
        said = done.stderr.decode(errors="replace").strip().partition("\n")[0][:200]
        raise UserError(f"espeak-ng {' '.join(options[:5])} failed: {said or f'exit code {done.returncode}'}")
    return done.stdout
