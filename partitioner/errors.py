"""The exceptions a user of partitioner can meet, as a tree.

PartitionerError
├── PlanError            the plan asks for what this model or mesh cannot give (also a ValueError)
├── CaptureError         the model could not be turned into one graph: where and why
├── LayoutError          a value's layout is not what its user requires (a collective is missing, say)
├── WeightError          a weight is missing, has no data (meta device) or the wrong shape or dtype
├── BundleError          a bundle cannot hold this program, or is damaged, altered or of another version
├── InputError           the inputs given at run time do not fit the program (also a ValueError)
├── SamplingError        sampling options out of range, or logits that leave no token to choose (also a ValueError)
└── CommunicationError   what went wrong between ranks
├── RankMismatch     ranks disagree on operation, shape or dtype; names both nodes
└── RankLost         another rank died, or did not answer before the deadline
"""

__all__ = [
    "BundleError",
    "CaptureError",
    "CommunicationError",
    "InputError",
    "LayoutError",
    "PartitionerError",
    "PlanError",
    "RankLost",
    "RankMismatch",
    "SamplingError",
    "WeightError",
]


class PartitionerError(Exception):
    """Base of every error raised on purpose by partitioner."""


class PlanError(PartitionerError, ValueError):
    """The plan cannot be carried out on this model or this world size."""


class CaptureError(PartitionerError):
    """The model could not be captured as a graph."""


class LayoutError(PartitionerError):
    """A value does not have the layout that its user requires."""


class WeightError(PartitionerError):
    """A weight is missing, has no data, or does not fit its description."""


class BundleError(PartitionerError):
    """A bundle cannot hold what it is given, or what it holds is not what it should be."""


class InputError(PartitionerError, ValueError):
    """The inputs given at run time do not fit the program."""


class SamplingError(PartitionerError, ValueError):
    """Options of sampling are out of range, or no token can be chosen from the logits."""


class CommunicationError(PartitionerError):
    """Something went wrong between ranks."""


class RankMismatch(CommunicationError):
    """Ranks disagree on the operation, the shape or the dtype of a collective."""


class RankLost(CommunicationError):
    """A rank died, or did not answer before the deadline."""
