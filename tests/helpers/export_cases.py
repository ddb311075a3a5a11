"""Models for tests of exports."""

from tests.helpers.small_models import ODD, SMALL, random_params


def export_case(model):
    odd = model in ("masked_lm", "token_classification")
    config = (ODD if odd else SMALL).replace(is_decoder=model == "causal_lm")
    return random_params(config, model), config
