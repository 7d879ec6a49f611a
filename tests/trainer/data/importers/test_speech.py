"""Voices as spectrograms: WAV files in a folder a speaker, and speakers that espeak-ng synthesises."""

import contextlib
import io
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest

from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.data.importers.speech import BANDS, FRAMES, HEIGHTS, UTTERANCES, list_speech, log_mel, read_speech
from trainer.errors import UserError

needs_espeak = pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="espeak-ng, which synthesises the voices, is not installed (apt-get)"
)


def wav(sound: np.ndarray, rate: int = 16_000, width: int = 2) -> bytes:
    """A WAV file of sound between -1 and 1, [samples] or [samples, channels]."""
    file = io.BytesIO()
    whole = np.rint(np.atleast_2d(sound.T).T * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    raw = (whole + (128 if width == 1 else 0)).astype("<i8").reshape(-1, 1).view(np.uint8)[:, :width]
    with wave.open(file, "wb") as out:
        out.setnchannels(whole.shape[1])
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(raw.tobytes())
    return file.getvalue()


def tone(hertz: float, seconds: float = 1.2, rate: int = 16_000) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def mel(hertz: float) -> float:
    return 2595 * np.log10(1 + hertz / 700)


@pytest.mark.parametrize("hertz", [200, 440, 1000, 3000, 7000])
def test_a_tone_is_loudest_in_the_band_of_its_pitch(hertz: float) -> None:
    found = log_mel(wav(tone(hertz)))
    middles = np.linspace(mel(60), mel(7600), BANDS + 2)[1:-1]
    expected = int(np.argmin(np.abs(middles - mel(hertz))))
    assert found.shape == (BANDS, FRAMES)
    assert (np.abs(found.argmax(axis=0) - expected) <= 1).all()
    assert abs(found.mean()) < 1e-4
    assert found.std() == pytest.approx(1, abs=1e-4)


def test_loudness_rate_width_and_channels_say_little() -> None:
    """The same sound, stored otherwise."""
    generator = np.random.default_rng(0)
    parts = [(hertz, 0.3 * generator.random()) for hertz in generator.uniform(100, 6000, 20)]

    def sound(rate: int) -> np.ndarray:
        time = np.arange(int(1.2 * rate)) / rate
        return sum(size * np.sin(2 * np.pi * hertz * time) for hertz, size in parts) / 4

    plain = log_mel(wav(sound(16_000)))
    strong = plain > 0  # the bands between the tones are the rounding of whole numbers
    both, third = wav(np.stack([sound(16_000)] * 2, axis=1)), wav(sound(16_000) / 3)
    for same in (both, third, *(wav(sound(16_000), width=width) for width in (3, 4))):
        np.testing.assert_allclose(log_mel(same)[strong], plain[strong], atol=0.02)
    for other in (wav(sound(44_100), 44_100), wav(sound(16_000), width=1)):
        assert np.abs(log_mel(other) - plain)[strong].mean() < 0.15


def test_the_second_with_most_in_it_is_taken_and_a_short_one_repeated() -> None:
    quiet, loud = 0.001 * tone(500, 3.0), tone(2000, 1.3)
    middle = log_mel(wav(np.concatenate([quiet, loud, quiet])))
    alone = log_mel(wav(loud))
    assert (middle.argmax(axis=0) == alone.argmax(axis=0)).mean() > 0.95
    short = log_mel(wav(np.concatenate([tone(500, 0.2), tone(2000, 0.1)])))
    heights = short.argmax(axis=0)
    period = 1 + int((0.3 - 0.025) / 0.010)
    np.testing.assert_array_equal(heights[:period], heights[period : 2 * period])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no WAV file of whole numbers"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "is no WAV file of whole numbers"),
        (wav(tone(500))[:30], "is no WAV file of whole numbers"),
        (wav(tone(500), rate=8000), "it has 8000 samples a second; allowed are 16000 to 192000"),
        (wav(np.zeros(16_000)), "it is silent in the bands of speech"),
        (wav(np.zeros(0)), "it holds no sound"),
        (wav(tone(500)) + b"\0" * (10 * 2**20), "bytes; at most 10485760 are read"),
    ],
)
def test_what_is_no_voice_is_told(data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        log_mel(data)


def test_any_bytes_after_the_header_are_read_or_told() -> None:
    whole = wav(tone(700, 0.3))
    generator = np.random.default_rng(1)
    for _ in range(300):
        broken = bytearray(whole)
        for place in generator.integers(0, 60, 3):
            broken[place] = generator.integers(256)
        with contextlib.suppress(UserError):
            assert np.isfinite(log_mel(bytes(broken))).all()


def test_a_folder_of_speakers(tmp_path: Path) -> None:
    for number in range(6):
        folder = tmp_path / "voices" / f"speaker{number}"
        folder.mkdir(parents=True)
        for take in range(3):
            (folder / f"{take}.wav").write_bytes(wav(tone(200 + 100 * number + take)))
    (tmp_path / "voices/speaker0/notes.txt").write_text("no sound")
    manifest = run_import(
        "speech", tmp_path / "voices", tmp_path / "set", ImportOptions(holdout_share=0.4, max_bad=0.1)
    )
    assert (manifest.content, list(manifest.shape)) == ("spectrogram", [BANDS, FRAMES])
    assert {name: split.identities for name, split in manifest.splits.items()} == {"train": 4, "val": 2}
    assert [bad.name for bad in manifest.bad] == ["speaker0/notes.txt"]
    assert "40 mel bands from 60 to 7600 Hz" in manifest.provenance["spectrogram"]


@needs_espeak
def test_synthesised_speakers_are_held_out_by_variant_and_say_the_same_each_time(monkeypatch, tmp_path: Path) -> None:
    listing = list_speech(None, ImportOptions(holdout_share=0.2), lambda *_: None)
    entries = list(listing.entries)
    speakers = sorted({entry.identity for entry in entries})
    assert len(entries) == len(speakers) * UTTERANCES
    assert listing.held_out is not None
    held = {speakers[number] for number in listing.held_out(speakers)}
    variants = {name: {one.partition("/")[0] for one in group} for name, group in
                (("held", held), ("left", set(speakers) - held))}  # fmt: skip
    assert len(variants["held"]) == round(0.2 * len(speakers) / len(HEIGHTS))
    assert not variants["held"] & variants["left"]
    read, again, other = (read_speech("", ImportOptions(seed=seed)) for seed in (0, 0, 1))
    place = entries[0].place
    assert read(place) == again(place) != other(place)
    assert read(entries[1].place) != read(place)


def test_without_espeak_its_absence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"espeak-ng, which is not installed; run apt-get install espeak-ng, or name a"):
        list_speech(None, ImportOptions(), lambda *_: None)


def test_what_espeak_says_when_it_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "espeak-ng"
    program.write_text("#!/bin/sh\necho cannot open its voices >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"espeak-ng --stdout -v en-us\+m1 .* failed: cannot open its voices"):
        read_speech("", ImportOptions())("m1/50/00")
