"""Public names of earlier versions, which go on working with a warning."""

from tokenstep.model.build import Parts, step_parts
from tokenstep.model.config import ModelConfig
from tokenstep.model.segmenter import Segmenter


class _Former(type):
    """A class that every segmenter is an instance of, as it was under its former name."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Segmenter)


class StepSegmenter(Segmenter, metaclass=_Former):
    """The former name of :class:`Segmenter`, which built its parts itself."""

    def __init__(self, config: "ModelConfig", parts: Parts | None = None) -> None:
        super().__init__(config, step_parts(config) if parts is None else parts)
