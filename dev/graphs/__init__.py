"""The example graphs: what dev/make_workflows.py writes into workflows/."""
from functools import partial

from . import custom_sampling, one_model, raylight, strategies, turbowan22, two_models

METHODS = ("vsa", "sta")
GRAPHS = {
    **{f"wan_t2v_{method}": partial(one_model.wan_t2v, method=method) for method in METHODS},
    "wan_t2v_14b_720p_vsa": one_model.wan_14b_720p,
    "wan_t2v_14b_raylight_vsa": raylight.text_to_video,
    "wan_t2v_vmoba": partial(one_model.wan_t2v, method="vmoba"),
    "wan_i2v_14b_vsa": one_model.wan_i2v,
    "wan_sta_strategy_search": strategies.search,
    "wan_sta_strategy_load": strategies.load,
    "wan_vsa_calibrate": strategies.calibrate,
    "wan_vsa_calibrated": strategies.calibrated,
    "wan22_t2v_14b_vsa": partial(two_models.text_to_video, fast=False),
    "wan22_t2v_14b_4step_vsa": partial(two_models.text_to_video, fast=True),
    "wan22_i2v_14b_vsa": partial(two_models.image_to_video, fast=False),
    "wan22_i2v_14b_4step_vsa": partial(two_models.image_to_video, fast=True),
    "fastwan_vsa_3step": custom_sampling.fastwan,
    "turbowan_t2v_sla_4step": custom_sampling.turbowan,
    "turbowan22_i2v_sla_4step": turbowan22.image_to_video,
    "fastwan_attach_gates_vsa": partial(custom_sampling.fastwan, attach=True),
    **{f"hunyuan_video15_t2v_{method}": partial(one_model.hunyuan15_t2v, method=method) for method in METHODS},
    "hunyuan_video15_i2v_vsa": one_model.hunyuan15_i2v,
    **{f"ltx2_t2v_{method}": partial(custom_sampling.ltx2, method=method) for method in METHODS},
    "ltx2_t2v_long_vsa": partial(custom_sampling.ltx2, method="vsa", long=True),
    "ltx2_i2v_vsa": partial(custom_sampling.ltx2, method="vsa", image=True),
    "minimax_h3_t2v_vsa": custom_sampling.minimax_h3,
}
"""Name of the file: page -> None, a function that draws the graph."""
