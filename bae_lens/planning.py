"""What a run would take, stage by stage, and whether that is there."""

from dataclasses import dataclass

FLOAT, LONG, INT = 4, 8, 4  # bytes
GPU_SHARE = 0.9  # of a GPU's memory; the rest is the driver's, and lost between blocks


@dataclass(frozen=True)
class Resources:
    """What there is, in bytes."""

    disk: int
    """Free."""
    memory: int
    """Of the device: a GPU's, or the host's."""
    on_gpu: bool
    """Whether the device is a GPU."""

    @property
    def usable(self) -> int:
        """Of the memory."""
        return int(GPU_SHARE * self.memory)

    @property
    def where(self) -> str:
        """Whose memory it is."""
        return "the GPU" if self.on_gpu else "the machine"


@dataclass(frozen=True)
class StagePlan:
    """A part of the work."""

    name: str
    """As in `stages.json`."""
    work: str
    """How much of what."""
    disk: int
    """Bytes of the arrays that it writes."""
    host: int
    """Bytes of the host's memory at most, without what the system keeps of files."""
    device: int
    """Bytes of the GPU's memory at most; 0 without one."""
    seconds: float | None = None
    """That it takes; None where nothing was timed."""


@dataclass(frozen=True)
class Plan:
    """What a run takes."""

    stages: list[StagePlan]
    """In their order."""
    misfits: list[str]
    """What does not fit, and by what to shrink, in a sentence each."""

    @property
    def disk(self) -> int:
        """Bytes of all stages together."""
        return sum(stage.disk for stage in self.stages)

    @property
    def host(self) -> int:
        """Bytes of the stage that takes most of the host's memory."""
        return max(stage.host for stage in self.stages)

    @property
    def device(self) -> int:
        """Bytes of the stage that takes most of the GPU's memory."""
        return max(stage.device for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """Of all stages that were timed together; None if none was."""
        timed = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(timed) if timed else None


def gb(n_bytes: int) -> str:
    """To three digits."""
    return f"{n_bytes / 1e9:,.3g} GB"
