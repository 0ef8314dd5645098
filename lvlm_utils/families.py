from lvlm_utils.parts import *  # noqa
from lvlm_utils.parts import decoder_of, towers_of, family_of, visual_ids  # noqa
