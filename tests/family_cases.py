"""Every model variant that the host tests sample: where its tokens are expected, and what stays dense."""
from dataclasses import dataclass

CROSS = "cross-attention"


@dataclass(frozen=True)
class Case:
    """One variant. Latents and grids as (t, h, w); the default latent of a kind is in dev/sampling.py."""

    name: str
    checkpoint: str
    kind: str
    grid: tuple
    prefix: int = 0
    suffix: int = 0
    layers: int = 2
    calls: int = 0
    """Calls of the clip's self-attention per forward pass; 0: one per layer."""
    passes: int = 1
    """Forward passes per step: conditions that the host does not batch."""
    other: frozenset = frozenset({CROSS})
    """What else reaches the hook."""
    odd: tuple = ((7, 9, 11), (2, 7, 13))
    """Latents that no patch and no tile divides, where core itself can sample them."""
    batch: bool = True
    """Whether core can sample a batch of clips."""
    needs: str = ""
    """A condition that core's models must know; where they do not, the case is skipped."""

    @property
    def calls_per_step(self):
        return (self.calls or self.layers) * self.passes


def joint(**fields):
    return dict(other=frozenset(), **fields)


def text_first(**fields):
    return dict(other=frozenset({"text refiner"}), **fields)


EVEN = ((7, 10, 6), (2, 6, 14))     # core does not pad these: odd in tokens, even in cells

CASES = (
    Case("Wan T2V", "tiny_wan_t2v", "wan", (5, 5, 6)),
    Case("Wan TI2V-5B", "tiny_wan22_ti2v", "wan", (5, 5, 6)),
    Case("Wan I2V", "tiny_wan_i2v", "wan", (5, 5, 6)),
    Case("Wan Fun Control", "tiny_wan_fun", "wan", (5, 5, 6)),
    Case("Wan FLF2V", "tiny_wan_flf", "wan_flf", (5, 5, 6)),
    Case("Wan FlowRVS", "tiny_wan_flow_rvs", "wan", (5, 5, 6)),
    Case("Wan VACE", "tiny_wan_vace", "wan_vace", (5, 4, 6), layers=4, calls=6, odd=EVEN),
    Case("Wan Camera", "tiny_wan_camera", "wan_camera", (5, 4, 6), odd=EVEN),
    Case("Wan with a reference image", "tiny_wan_ref", "wan_ref", (5, 4, 6), prefix=24, odd=EVEN),
    Case("Wan with in-context references", "tiny_wan_t2v", "wan_context", (5, 5, 6), suffix=30 + 24,
         needs="context_latents"),
    Case("Wan with frames appended in time", "tiny_wan_t2v", "wan_concat", (5, 5, 6), suffix=2 * 30),
    Case("Wan S2V", "tiny_wan_s2v", "wan_s2v", (5, 5, 8), suffix=40 + 64 + 16 + 16, odd=((3, 9, 16), (7, 15, 8))),
    Case("Wan Animate", "bare_wan_animate", "wan_animate", (5, 4, 6), odd=EVEN),
    Case("Wan Animate 2 without a pose", "tiny_wan_animate2", "wan_animate2", (4, 5, 6), prefix=30,
         odd=((7, 9, 11), (3, 7, 13))),
    Case("Wan Animate 2 with a pose", "tiny_wan_animate2", "wan_animate2_pose", (4, 4, 6),
         odd=((7, 9, 11), (3, 7, 13))),
    Case("Wan HuMo", "bare_wan_humo", "wan_humo", (5, 4, 6), suffix=2 * 24, odd=EVEN),
    Case("Wan SCAIL", "tiny_wan_scail", "wan_scail", (5, 5, 6), prefix=30, suffix=5 * 9),
    Case("Wan SCAIL-2", "tiny_wan_scail2", "wan_scail2", (5, 5, 6), prefix=30, suffix=5 * 9),
    Case("WanDancer", "tiny_wan_dancer", "wan_dancer", (5, 4, 8), odd=((3, 7, 16), (7, 5, 15))),
    Case("HunyuanVideo", "tiny_hunyuan_video", "hunyuan", (3, 4, 6), prefix=7, layers=4, **text_first(odd=EVEN)),
    Case("HunyuanVideo I2V", "tiny_hunyuan_i2v", "hunyuan", (3, 4, 6), prefix=7, layers=4, **text_first(odd=EVEN)),
    Case("HunyuanVideo with a reference image", "tiny_hunyuan_video", "hunyuan_ref", (3, 4, 6), prefix=7 + 24,
         layers=4, **text_first(odd=EVEN, batch=False)),
    Case("HunyuanVideo 1.5", "tiny_hunyuan_video15", "hunyuan15", (3, 4, 6), prefix=7 + 5, **text_first()),
    Case("HunyuanVideo 1.5 with glyphs", "bare_hunyuan15_byt5", "hunyuan15", (3, 4, 6), prefix=7 + 5 + 4,
         **text_first()),
    Case("HunyuanVideo 1.5 super-resolution", "tiny_hunyuan15_sr", "hunyuan15", (3, 4, 6), prefix=12, **text_first()),
    Case("LTXV", "tiny_ltxv", "ltxv", (3, 4, 6)),
    Case("LTXV with guides", "tiny_ltxv", "ltxv_guide", (3, 4, 6), suffix=48, odd=((7, 9, 11), (4, 7, 13))),
    Case("LTXV with thinned guides", "tiny_ltxv", "ltxv_sparse_guide", (3, 4, 6), suffix=24, odd=((7, 5, 10),)),
    Case("LTX-2", "tiny_ltxav", "ltxav", (3, 4, 6),
         other=frozenset({CROSS, "attention over something other than the clip"})),
    Case("CogVideoX", "tiny_cogvideox", "cogvideox", (3, 4, 6), prefix=7, **joint()),
    Case("CogVideoX 1.5", "tiny_cogvideox15", "cogvideox", (2, 4, 6), prefix=7, **joint(odd=((7, 9, 11), (3, 7, 13)))),
    Case("Mochi", "bare_mochi", "mochi", (3, 4, 6), suffix=5, **joint(odd=EVEN)),
    Case("Cosmos 1", "bare_cosmos1", "cosmos", (3, 4, 6), odd=EVEN),
    Case("Cosmos Predict2", "bare_cosmos_predict2", "cosmos_predict2", (3, 5, 6)),
    Case("Kandinsky 5", "tiny_kandinsky5", "kandinsky5", (3, 4, 6), other=frozenset({CROSS, "text encoder"}), odd=EVEN),
    Case("MiniMax H3", "tiny_minimax_h3", "minimax_h3", (2, 4, 6), prefix=7 + 16, passes=2, **joint(batch=False)),
    Case("MiniMax H3 with a keyframe", "tiny_minimax_h3", "minimax_h3_keyframe", (2, 4, 6), prefix=7 + 24 + 16,
         passes=2, **joint(batch=False)),
)
