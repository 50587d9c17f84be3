"""Built-in conversations: generated features whose emotions follow speaker-dependent dynamics.

A cast of characters meets in long dialogues that keep coming back to a few topics. What a speaker
feels next depends on who they are and what they talk about: they stay in their mood (inertia),
answer the last other speaker's emotion in their own way (contagion: some mirror it, some turn it
round), take the tone that the topic has in this dialogue, or fall back on their temperament.

Text shows the topic and, weakly, the emotion: pairs of emotions apart but hardly the two within a
pair. Audio shows mostly the two within a pair, visual features a mixture. Both also carry the
speaker's own voice or face, an offset of the whole recording, episodes of background noise that
all speakers share, and white noise.
So relations between speakers, denoising, the topics that text connects over long distances, and
the other modalities each hold something that the text of one utterance does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .data import SPLITS, TEXT, Corpus, Dialogue

EMOTIONS = ("happy", "excited", "sad", "frustrated", "neutral", "surprised")
CENTRAL = 0.35  # how much of the within-pair contrast text shows, relative to the others


@dataclass(frozen=True)
class SyntheticConfig:
    """Size, dynamics and noise of the generated conversations.

    Attributes:
        seed: of everything; the same settings give the same corpus.
        dialogues: number of dialogues in train, validation and test.
        utterances: shortest and longest dialogue, inclusive.
        speakers: fewest and most speakers of a dialogue, inclusive.
        cast: characters that the speakers are drawn from; each has a temperament of its own.
        inertia: mean probability that speakers stay in their mood.
        contagion: mean probability that speakers answer the other's emotion instead.
        tone: mean probability that speakers take the tone of the topic instead.
        topics: topics that all dialogues draw from; each has a direction of its own in the text.
        topics_per_dialogue: fewest and most topics of a dialogue, inclusive.
        text_dim: width of the text features.
        audio_dim: width of the audio features.
        visual_dim: width of the visual features.
        text_snr: signal-to-noise ratio of the text features against white noise, in dB.
        audio_snr: the same for audio.
        visual_snr: the same for visual features.
        topic: power of the topic in the text features, in dB relative to the emotion's signal.
        background: power of the shared background episodes in audio and visual features, in dB
            relative to the emotion's signal.
        identity: power of the speaker's own voice and face, in dB relative to the signal.
        channel: power of what a whole recording has in common (room, microphone, light), in dB
            relative to the signal.
    """

    seed: int = 0
    dialogues: tuple[int, int, int] = (140, 30, 40)
    utterances: tuple[int, int] = (40, 120)
    speakers: tuple[int, int] = (2, 5)
    cast: int = 40
    inertia: float = 0.35
    contagion: float = 0.25
    tone: float = 0.3
    topics: int = 20
    topics_per_dialogue: tuple[int, int] = (3, 6)
    text_dim: int = 96
    audio_dim: int = 64
    visual_dim: int = 64
    text_snr: float = -18.0
    audio_snr: float = -14.0
    visual_snr: float = -15.0
    topic: float = 12.0
    background: float = 0.0
    identity: float = 3.0
    channel: float = 20.0

    def __post_init__(self) -> None:
        for name in ("utterances", "speakers", "topics_per_dialogue"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(
                    f"{name} must be (low, high) with 1 <= low <= high, got {low, high}"
                )
        if min(self.dialogues) < 1:
            raise ValueError(f"dialogues must be at least 1 in each split, got {self.dialogues}")
        for name, of in (("cast", "speakers"), ("topics", "topics_per_dialogue")):
            most = getattr(self, of)[1]
            if getattr(self, name) < most:
                raise ValueError(
                    f"{name} must be at least {of}[1]={most}, got {getattr(self, name)}"
                )
        for name in ("inertia", "contagion", "tone"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        total = self.inertia + self.contagion + self.tone
        if total > 1:
            raise ValueError(f"inertia + contagion + tone must be at most 1, got {total}")
        for name in ("text_dim", "audio_dim", "visual_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def generate(config: SyntheticConfig) -> Corpus:
    """Generate a corpus with modalities text, audio and visual, and six emotions.

    Returns:
        A corpus whose provenance calls every modality generated.
    """
    generator = np.random.default_rng(config.seed)
    cast = _Cast.draw(config, generator)
    codes = _codes(config, generator)
    topics = generator.standard_normal((config.topics, config.text_dim))
    splits = {}
    for split, count in zip(SPLITS, config.dialogues, strict=True):
        names = [f"{split}-{index:04d}" for index in range(count)]
        splits[split] = tuple(
            _dialogue(name, config, cast, codes, topics, generator) for name in names
        )
    note = f"generated by rdfkern (seed {config.seed}); not recorded from people"
    return Corpus("built-in", EMOTIONS, splits, {name: note for name in codes})


@dataclass(frozen=True)
class _Cast:
    """Temperaments of the characters and how they look and sound."""

    habits: np.ndarray  # [cast, 3], probabilities of keeping a mood, answering, taking the tone
    temperament: np.ndarray  # [cast, classes], rows sum to 1
    answer: np.ndarray  # [cast, classes], the emotion with which they answer another's
    identity: dict[str, np.ndarray]  # modality: [cast, dim]

    @classmethod
    def draw(cls, config: SyntheticConfig, generator: np.random.Generator) -> _Cast:
        classes = len(EMOTIONS)
        means = np.array([config.inertia, config.contagion, config.tone])
        habits = means * generator.uniform(0.7, 1.3, (config.cast, 3))
        mirror = np.arange(classes)
        contrary = generator.random(config.cast) < 0.5
        dims = {"audio": config.audio_dim, "visual": config.visual_dim}
        return cls(
            habits / np.maximum(1.0, habits.sum(axis=1, keepdims=True)),
            generator.dirichlet(np.full(classes, 2.0), config.cast),
            np.where(contrary[:, None], np.roll(mirror, 2), mirror),
            {
                name: _amplitude(config.identity) * generator.standard_normal((config.cast, dim))
                for name, dim in dims.items()
            },
        )


def _codes(config: SyntheticConfig, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Mean feature of each emotion in each modality, (classes, dim) with unit power per entry."""
    pairs = len(EMOTIONS) // 2
    between = np.repeat(np.eye(pairs), 2, axis=0)  # [classes, pairs]
    within = np.tile([[1.0], [-1.0]], (pairs, 1)) * between  # [classes, pairs]
    shares = {
        "text": (config.text_dim, 1.0, CENTRAL),
        "audio": (config.audio_dim, CENTRAL, 1.0),
        "visual": (config.visual_dim, 0.7, 0.7),
    }
    codes = {}
    for name, (dim, share_between, share_within) in shares.items():
        basis = generator.standard_normal((2 * pairs, dim))
        code = np.hstack([share_between * between, share_within * within]) @ basis
        codes[name] = code / np.sqrt(np.mean(code**2))
    return codes


def _dialogue(
    name: str,
    config: SyntheticConfig,
    cast: _Cast,
    codes: dict[str, np.ndarray],
    topics: np.ndarray,
    generator: np.random.Generator,
) -> Dialogue:
    length = int(generator.integers(config.utterances[0], config.utterances[1] + 1))
    present = int(generator.integers(config.speakers[0], config.speakers[1] + 1))
    raised = int(
        generator.integers(config.topics_per_dialogue[0], config.topics_per_dialogue[1] + 1)
    )
    who = generator.choice(config.cast, present, replace=False)
    speaker = who[_runs(length, present, 0.7, generator)]  # [T]
    what = generator.choice(config.topics, raised, replace=False)
    topic = _runs(length, raised, 0.2, generator)  # [T]
    tone = generator.integers(len(EMOTIONS), size=raised)[topic]  # [T]
    emotion = _emotions(speaker, tone, cast, generator)  # [T]
    snr = {"text": config.text_snr, "audio": config.audio_snr, "visual": config.visual_snr}
    features = {}
    for modality, code in codes.items():
        shape = (length, code.shape[1])
        values = code[emotion] + _amplitude(-snr[modality]) * generator.standard_normal(shape)
        if modality == TEXT:
            values += _amplitude(config.topic) * topics[what[topic]]
        else:
            values += cast.identity[modality][speaker]
            values += _amplitude(config.channel) * generator.standard_normal(code.shape[1])
            values += _amplitude(config.background) * _background(*shape, generator)
        features[modality] = values.astype(np.float32)
    return Dialogue(name, tuple(f"character-{index:02d}" for index in speaker), emotion, features)


def _amplitude(decibel: float) -> float:
    return 10 ** (decibel / 20)


def _runs(length: int, count: int, change: float, generator: np.random.Generator) -> np.ndarray:
    """Which of `count` has the floor at each step; it passes on with probability `change`, (T,)."""
    runs = np.zeros(length, np.int64)
    for step in range(1, length):
        passes = count > 1 and generator.random() < change
        runs[step] = (runs[step - 1] + (generator.integers(1, count) if passes else 0)) % count
    return runs


def _emotions(
    speaker: np.ndarray, tone: np.ndarray, cast: _Cast, generator: np.random.Generator
) -> np.ndarray:
    """Emotion of each utterance by its speaker's dynamics and its topic's tone, (T,) int64."""
    emotion = np.zeros(len(speaker), np.int64)
    mood: dict[int, int] = {}  # in the order in which people spoke last
    for step, who in enumerate(speaker):
        others = [felt for person, felt in mood.items() if person != who]
        habit = int(np.searchsorted(cast.habits[who].cumsum(), generator.random(), side="right"))
        if habit == 0 and who in mood:
            emotion[step] = mood[who]
        elif habit == 1 and others:
            emotion[step] = cast.answer[who][others[-1]]
        elif habit == 2:
            emotion[step] = tone[step]
        else:
            emotion[step] = generator.choice(len(EMOTIONS), p=cast.temperament[who])
        mood.pop(who, None)
        mood[who] = int(emotion[step])
    return emotion


def _background(length: int, dim: int, generator: np.random.Generator) -> np.ndarray:
    """Episodes of constant noise (music, a dark room), each 4 to 15 utterances long, (T, dim)."""
    background = np.zeros((length, dim))
    start = 0
    while start < length:
        end = start + int(generator.integers(4, 16))
        background[start:end] = generator.standard_normal(dim)
        start = end
    return background
