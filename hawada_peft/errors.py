"""Every error of the package. Each message names what was given, what is allowed and what to do."""


class HawAdaError(ValueError):
    """Base class of all errors raised on bad input. A `ValueError`, so that PEFT's and the user's handlers apply."""


class UnsupportedModelError(HawAdaError):
    """The model, or one of its modules, is not one that gates or slimming can be placed on."""


class IllegalShapeError(HawAdaError):
    """No vanilla model of the requested shape exists: the config class refuses it, or builds other sizes."""


class InvalidPlanError(HawAdaError):
    """A plan contradicts itself, or asks for something that the gates or the model do not have."""


class IncompatibleBaseError(HawAdaError):
    """A plan or an adapter was made for a base model of other sizes."""


class BrokenGatesError(HawAdaError):
    """Gates hold NaN or infinite values."""


class DivergedError(HawAdaError):
    """In training a loss or a weight has become NaN or infinite."""


class CheckpointError(HawAdaError):
    """A checkpoint is not complete, damaged, or of another training."""


class RowsError(HawAdaError):
    """Gates have values for each row of the batch, and a module's input does not have the rows on its first axis."""


class VerificationError(RuntimeError):
    """A slim model computes something else than the gated one, or a saved one does not reload to what was exported."""


class RegistrationError(RuntimeError):
    """The tuner type could not be made known to PEFT."""


class BadDataError(HawAdaError):
    """Data that a model cannot take: other inputs, token ids outside its vocabulary, NaN, a mask that does not fit."""


class InvalidRegimeError(HawAdaError):
    """What is to be timed contradicts itself, or the model cannot run that way."""


class ExternalClockError(HawAdaError):
    """The callable or program that times models does not give a number of seconds above 0."""


class IncompatibleTableError(HawAdaError):
    """A latency table was measured for another device, dtype, regime or model."""


class InvalidBudgetError(HawAdaError):
    """A budget contradicts itself or names impossible numbers."""


class InfeasibleBudgetError(HawAdaError):
    """No legal shape meets the budget; the message gives the range that can be reached and what binds."""


class UnsettledTimingWarning(UserWarning):
    """A timer's median was still moving when the rounds were used up."""


class UncachedTableWarning(UserWarning):
    """A latency table was measured, and could not be kept for later."""


class UntiedEmbeddingsWarning(UserWarning):
    """Tied embeddings became two tensors, because the stream was rotated; the message says what that costs."""
