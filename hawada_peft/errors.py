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


class VerificationError(RuntimeError):
    """A saved slim model does not reload to the model that was exported."""


class RegistrationError(RuntimeError):
    """The tuner type could not be made known to PEFT."""
