"""Every method is a function in one of these families; importing the package registers them all."""

from jaxpo.losses import pairwise as pairwise
from jaxpo.losses import reference_free as reference_free
from jaxpo.losses import registry as registry
from jaxpo.losses import scores as scores
from jaxpo.losses.registry import LOSSES as LOSSES
from jaxpo.losses.registry import Needs as Needs
from jaxpo.losses.registry import find as find
from jaxpo.losses.registry import loss as loss
