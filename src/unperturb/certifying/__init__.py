"""What no attacker can change, proved: an L2 radius by smoothing, a patch by double masking."""

from unperturb.certifying.patches import DoubleMasking, PatchCertificates, certify_patch
from unperturb.certifying.smoothing import Certificates, certify

__all__ = ["Certificates", "DoubleMasking", "PatchCertificates", "certify", "certify_patch"]
