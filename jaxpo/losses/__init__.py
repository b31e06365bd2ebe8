"""Every method is a function in one of these families; importing the package registers them all."""

from jaxpo.losses import anchored as anchored
from jaxpo.losses import batch as batch
from jaxpo.losses import conditional as conditional
from jaxpo.losses import known_priors as known_priors
from jaxpo.losses import many as many
from jaxpo.losses import margins as margins
from jaxpo.losses import masks as masks
from jaxpo.losses import moments as moments
from jaxpo.losses import multi_objective as multi_objective
from jaxpo.losses import pairwise as pairwise
from jaxpo.losses import priors as priors
from jaxpo.losses import reference_free as reference_free
from jaxpo.losses import registry as registry
from jaxpo.losses import scores as scores
from jaxpo.losses import token_level as token_level
from jaxpo.losses import weighted as weighted
from jaxpo.losses.registry import LOSSES as LOSSES
from jaxpo.losses.registry import Needs as Needs
from jaxpo.losses.registry import Range as Range
from jaxpo.losses.registry import find as find
from jaxpo.losses.registry import loss as loss
