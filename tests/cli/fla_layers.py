"""Small models of flash-linear-attention (fla): configs, tensors by name, and logits.

The logits are those of the equations of fla's layers in fp64, one step at a time, over one sequence
x (T, d); written for these tests, against the names and shapes of fla's state dictionaries.
"""

import torch
import torch.nn.functional as F

D, L, VOCAB, INNER = 16, 2, 40, 24
FLA = {
    "hidden_size": D,
    "num_hidden_layers": L,
    "vocab_size": VOCAB,
    "intermediate_size": INNER,
    "hidden_act": "swish",
    "norm_eps": 1e-3,  # so large that a norm with another one is seen
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GQA = {"num_heads": 4, "num_kv_heads": 2}
WIDTHS = {"expand_k": 0.5, "expand_v": 1.0}
CONFIGS = {
    "transformer": FLA | GQA | {"window_size": 5, "rope_theta": 500.0},
    "gla": FLA | GQA | WIDTHS | {"feature_map": "relu"},
    "gsa": FLA | GQA | {"num_slots": 3, "gate_logit_normalizer": 4, "feature_map": "swish"},
    "retnet": FLA | {"num_heads": 2, "expand_k": 1.0, "expand_v": 2.0},
    "hgrn2": FLA | {"num_heads": 4, "expand_ratio": 4},
    "abc": FLA | {"num_heads": 2, "num_slots": 3, "use_rope": True} | WIDTHS,
}
CONFIGS = {kind: {"model_type": kind} | config for kind, config in CONFIGS.items()}
ATTN = {  # the tensors in a layer's attn, as fla has them
    "transformer": {"q_proj": (16, D), "k_proj": (8, D), "v_proj": (8, D), "o_proj": (D, 16)},
    "gla": {
        "q_proj": (8, D),
        "k_proj": (4, D),
        "v_proj": (8, D),
        "g_proj": (16, D),
        "gk_proj.0": (16, D),
        "gk_proj.1": (4, 16),
        "g_norm_swish_gate": (4,),
        "o_proj": (D, 16),
    },
    "gsa": {
        "q_proj": (16, D),
        "k_proj": (8, D),
        "v_proj": (8, D),
        "f_proj": (6, D),
        "g_norm": (D,),
        "o_proj": (D, 16),
    },
    "retnet": {
        "q_proj": (16, D),
        "k_proj": (16, D),
        "v_proj": (32, D),
        "g_proj": (32, D),
        "g_norm_swish_gate": (16,),
        "o_proj": (D, 32),
    },
    "hgrn2": {
        "q_proj": (16, D),
        "f_proj": (16, D),
        "i_proj": (16, D),
        "g_norm": (D,),
        "o_proj": (D, 16),
    },
    "abc": {
        "q_proj": (8, D),
        "k_proj": (8, D),
        "v_proj": (16, D),
        "g_proj": (16, D),
        "s_proj": (6, D),
        "g_norm": (8,),
        "o_proj": (D, 16),
    },
}


def fla_tensors(kind, seed=0):
    shapes = {"model.embeddings.weight": (VOCAB, D), "model.norm.weight": (D,)}
    shapes["lm_head.weight"] = (VOCAB, D)
    if kind == "hgrn2":
        shapes["model.lower_bounds"] = (L, D)
    for i in range(L):
        p = f"model.layers.{i}."
        shapes |= {p + "attn_norm.weight": (D,), p + "mlp_norm.weight": (D,)}
        shapes |= {p + f"attn.{n}.weight": shape for n, shape in ATTN[kind].items()}
        if kind == "gla":
            shapes[p + "attn.gk_proj.1.bias"] = (4,)
        shapes |= {p + f"mlp.{n}_proj.weight": (INNER, D) for n in ("gate", "up")}
        shapes[p + "mlp.down_proj.weight"] = (D, INNER)
    return draw(shapes, seed)


def draw(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: 0.5 * torch.randn(s, generator=generator) for n, s in shapes.items()}


def rms(x, w, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w


def turned(x, theta):
    d = x.shape[-1]
    angle = torch.arange(len(x))[:, None] * theta ** (-torch.arange(0, d, 2) / d).double()
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def recurrent(q, k, v, log_a):
    """o (T, H, V) of q, k (T, H, K), v (T, H, V), log_a like k; heads of k are repeated."""
    groups = q.shape[1] // k.shape[1]
    k, v, log_a = (x.repeat_interleave(groups, 1) for x in (k, v, log_a))
    S, o = 0, []
    for t in range(len(q)):
        S = log_a[t].exp()[..., None] * S + k[t][..., None] * v[t][:, None]
        o.append((q[t][..., None] * S).sum(1))
    return torch.stack(o)


def attn(kind, config, w, bias, x):
    heads = config["num_heads"]
    kv = config.get("num_kv_heads") or heads
    eps, parts = config["norm_eps"], {n: x @ y.T for n, y in w.items() if y.shape[1:] == (D,)}
    q = parts["q_proj"].unflatten(-1, (heads, -1))
    if kind != "hgrn2":
        k, v = (parts[n].unflatten(-1, (kv, -1)) for n in ("k_proj", "v_proj"))
    if kind == "transformer":
        theta = config["rope_theta"]
        q, k, v = turned(q, theta), *(turned(k, theta), v)
        k, v = (y.repeat_interleave(heads // kv, 1) for y in (k, v))
        z = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
        at = torch.arange(len(x))
        seen = (at[:, None] >= at) & (at[:, None] - at < config["window_size"])
        o = torch.einsum("hts,shd->thd", z.masked_fill(~seen, -torch.inf).softmax(-1), v)
        return o.flatten(1)
    if kind == "gla":
        a = F.logsigmoid(x @ w["gk_proj.0"].T @ w["gk_proj.1"].T + bias) / 16
        o = recurrent(q.relu(), k.relu(), v, a.unflatten(-1, (kv, -1))) / q.shape[-1] ** 0.5
    if kind == "retnet":
        q, k = turned(q, 10_000.0), turned(k, 10_000.0)
        a = (1 - 2.0 ** (-5 - torch.arange(heads).double())).log()
        o = recurrent(q, k, v, a[:, None].expand_as(k)) / q.shape[-1] ** 0.5
    if kind == "abc":
        q, k = turned(q, 10_000.0), turned(k, 10_000.0)
        e = parts["s_proj"].unflatten(-1, (heads, -1)).clamp(-32, 32).exp()
        Z = e.cumsum(0)
        K, V = (torch.einsum("thm,thd->thmd", e, y).cumsum(0) / Z[..., None] for y in (k, v))
        p = (torch.einsum("thmd,thd->thm", K, q) / q.shape[-1] ** 0.5).softmax(-1)
        o = torch.einsum("thm,thmd->thd", p, V)
    if kind in ("gla", "retnet", "abc"):
        norm = w.get("g_norm_swish_gate", w.get("g_norm"))
        return (rms(o, norm, eps) * F.silu(parts["g_proj"].view_as(o))).flatten(1)
    if kind == "gsa":
        f = F.logsigmoid(parts["f_proj"].unflatten(-1, (kv, -1))) / config["gate_logit_normalizer"]
        q, k, v, s = F.silu(q), F.silu(k), F.silu(v), 1 - f.exp()
        groups = heads // kv
        k, v, f, s = (y.repeat_interleave(groups, 1) for y in (k, v, f, s))
        K = V = 0
        o = []
        for t in range(len(x)):
            K = f[t].exp()[..., None] * K + s[t][..., None] * k[t][:, None]
            V = f[t].exp()[..., None] * V + s[t][..., None] * v[t][:, None]
            p = (K * q[t][:, None]).sum(-1).softmax(-1)
            o.append((p[..., None] * V).sum(1))
        return rms(F.silu(torch.stack(o).flatten(1)), w["g_norm"], 1e-5)
    b = bias  # hgrn2
    f = b + (1 - b) * parts["f_proj"].sigmoid()
    k, a, v = (y.unflatten(-1, (heads, -1)) for y in (1 - f, f.log(), parts["i_proj"]))
    o = recurrent(F.silu(q), k, v, a) / q.shape[-1] ** 0.5
    return rms(o.flatten(1), w["g_norm"], 1e-5)


def fla_logits(kind, config, tensors, tokens, attention=None):
    """attention: layer -> config, of the layers of a hybrid that have softmax attention."""
    t = {n: x.double() for n, x in tensors.items()}
    h, eps = t["model.embeddings.weight"][tokens], config["norm_eps"]
    for i in range(L):
        p = f"model.layers.{i}."
        here, own = ("transformer", attention[i]) if i in (attention or {}) else (kind, config)
        w = {n: t[f"{p}attn.{n}.weight"] for n in ATTN[here]}
        bias = t.get(p + "attn.gk_proj.1.bias")
        if kind == "hgrn2":
            shares = t["model.lower_bounds"].softmax(0)
            bias = shares.cumsum(0)[i] - shares[0]
        x = rms(h, t[p + "attn_norm.weight"], eps)
        h = h + attn(here, own, w, bias, x) @ w["o_proj"].T
        x = rms(h, t[p + "mlp_norm.weight"], eps)
        gate, up, down = (t[f"{p}mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = h + (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    return rms(h, t["model.norm.weight"], eps) @ t["lm_head.weight"].T
