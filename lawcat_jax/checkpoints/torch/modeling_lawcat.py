"""A linear-attention student (LAWCAT, arXiv 2509.18467; LoLCATs, arXiv 2410.10254) for transformers, in plain torch.

A pretrained decoder whose softmax attention is replaced in all or most layers, so that generation keeps a state of
constant size instead of a cache that grows. One LAWCAT layer, for query head h and its key-value head:

    q~, k~ = causal depthwise convolutions over the last few tokens of q and k (no rotary embedding)
    phi(u) = [softmax(u Phi) ; softmax(-u Phi)]                       non-negative features, K of them
    g      = log sigmoid(x W1 W2 + b) / 16, not below the bound       log-decay of every feature
    S_t    = e^(g_t) S_(t-1) + phi(k~_t) [v_t ; 1]^T                  the state, float32
    o_t    = numerator / denominator of  phi(q~_t)^T S_t              the last column is the denominator

Names: B sequences, T tokens, H query heads, N key-value heads, d width of a head, K features.

Padding may stand anywhere: at the entrance the valid tokens of each sequence are moved to the front, and hidden states
are put back at the exit. In between, ``lengths`` says how many tokens are valid, and the others change no state.

All of it is one file, longer than others here, because it is copied beside exported weights and read there by people who
have nothing else of this project.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# torch types every attribute of a module as "Tensor | Module", and transformers its caches' layers as their base class.

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_lawcat import LawcatConfig

try:  # its fused kernels, where a GPU is there
    from fla.ops.gla import chunk_gla as fla_gla  # pyright: ignore[reportMissingImports]
except ImportError:
    fla_gla = None

CHUNK, NATS = 64, 80  # most tokens of a chunk, and most decay within one: e^(+-40) is safe in float32
SEGMENT = 2048  # tokens whose chunk states are in memory together
# What transformers calls the cache: "past_key_values", and "cache" in late releases of version 5.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class Context(NamedTuple):
    """What a layer knows of the tokens of one call: rotary table [B, T, half], tokens that each sequence had before
    [B], and how many of the T are valid [B] (None: all)."""

    cos: torch.Tensor
    sin: torch.Tensor
    start: torch.Tensor
    lengths: torch.Tensor | None

    def valid(self):
        """bool [B, T]."""
        if self.lengths is None:
            return torch.ones(self.cos.shape[:2], dtype=torch.bool, device=self.cos.device)
        return torch.arange(self.cos.shape[1], device=self.cos.device) < self.lengths[:, None]


# Cache


class LayerState(CacheLayerMixin):
    """The state of one layer: named tensors [B, ...], which only softmax layers let grow."""

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.state, self.seen = {}, 0

    def replace(self, state, tokens):
        """Take the state after ``tokens`` more tokens, padding included."""
        self.state, self.seen, self.is_initialized = state, self.seen + tokens, True

    def get_seq_length(self, *args):
        return self.seen

    def get_max_length(self):
        return -1

    def get_max_cache_shape(self):
        return -1

    def get_mask_sizes(self, query_length, *args):
        return self.seen + int(query_length), 0

    def lazy_initialization(self, *args):
        raise NotImplementedError("the layers of this model write their state themselves")

    def update(self, *args, **kwargs):
        raise NotImplementedError("the layers of this model write their state themselves")

    def reset(self):
        self.state, self.seen, self.is_initialized = {}, 0, False

    def _map(self, function):
        self.state = {name: function(x) for name, x in self.state.items()}

    def offload(self):
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self):
        pass

    def reorder_cache(self, beam_idx):
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats):
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        self._map(lambda x: x[indices.to(x.device)])


class LawcatCache(Cache):
    """The states of all layers; of constant size, but for layers that keep softmax attention."""

    def __init__(self, config):
        super().__init__(layers=[LayerState() for _ in range(config.lawcat["model"]["num_layers"])])

    @property
    def nbytes(self):
        """Bytes held."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.state.values())

    def crop(self, *args, **kwargs):
        raise ValueError("a state cannot be rolled back: keep a copy of the cache, or read the shorter text again")


def extend(rows, x, count):
    """[rows ; x] along time; ``count`` zeros stand for the start of a sequence."""
    if rows is None:
        rows = x.new_zeros(x.shape[0], count, *x.shape[2:])
    return torch.cat([rows.to(x), x], dim=1)


def last_rows(extended, count, lengths):
    """The last ``count`` rows of what :func:`extend` gave that are valid, where ``lengths`` of the new ones are."""
    if lengths is None:
        return extended[:, extended.shape[1] - count :]
    index = lengths[:, None] + torch.arange(count, device=extended.device)
    return extended.gather(
        1, index.reshape(*index.shape, *(1,) * (extended.ndim - 2)).expand(-1, -1, *extended.shape[2:])
    )


# Parts of a mixer


def rotate(x, context):
    """Rotary embedding of the first dimensions of every head, x [B, T, H, d]."""
    half = context.cos.shape[-1]
    cos, sin = context.cos[:, :, None], context.sin[:, :, None]
    low, high = x[..., :half].float(), x[..., half : 2 * half].float()
    parts = [low * cos - high * sin, high * cos + low * sin, x[..., 2 * half :].float()]
    return torch.cat(parts, dim=-1).to(x.dtype)


def repeat_heads(x, heads):
    """[B, T, N, d] -> [B, T, H, d]; every key-value head serves H / N query heads in a row."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def both_softmax(s):
    return torch.cat([s.softmax(-1), (-s).softmax(-1)], dim=-1)


def exp_dim(s):
    return torch.cat([(s - s.amax(-1, keepdim=True)).exp(), (s.amin(-1, keepdim=True) - s).exp()], dim=-1)


FEATURE_MAPS = {  # of scores [..., f], and how many times f the features are
    "softmax_dim": (both_softmax, 2),
    "half_softmax": (lambda s: s.softmax(-1), 1),
    "exp_dim": (exp_dim, 2),
    "relu": (F.relu, 1),
    "pos_elu": (lambda s: F.elu(s) + 1, 1),
}


def gated_linear_attention(q, k, v, log_g, state, chunk):
    """(phi(q)^T S after every token, S after the last): q, k, log_g [B, T, H, K], v [B, T, H, V], S [B, H, K, V].

    Within a chunk, b being the running sum of log_g and r half of its total, token i reads token j <= i with the weight
    (q_i e^(b_i - r)) . (k_j e^(r - b_j)); between chunks the state decays by e^(total). ``chunk`` 1: token by token,
    where a single gate may be more than float32 can hold in that form.
    """
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    if q.shape[1] == 1 or chunk == 1:
        for q_t, k_t, v_t, g_t in zip(*(x.unbind(1) for x in (q, k, v, log_g)), strict=True):
            state = g_t.exp()[..., None] * state + k_t[..., None] * v_t[..., None, :]
            outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, state))
        return torch.stack(outputs, dim=1), state
    for first in range(0, q.shape[1], SEGMENT):
        part = (x[:, first : first + SEGMENT] for x in (q, k, v, log_g))
        o, state = _chunks(*part, state, chunk)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


def _chunks(q, k, v, log_g, state, chunk):
    length = q.shape[1]
    # [B, T, H, .] -> [B, H, chunks, chunk, .]; the padding of the last chunk has k = 0 and log_g = 0.
    q, k, v, log_g = (
        F.pad(x, (0, 0, 0, 0, 0, -length % chunk)).unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)
        for x in (q, k, v, log_g)
    )
    b = log_g.cumsum(-2)
    total = b[..., -1:, :]
    r = total / 2
    q, k = q * (b - r).exp(), k * (r - b).exp()
    scores = q @ k.transpose(-1, -2)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    inside = scores.masked_fill(later, 0) @ v
    added = (total - r).exp().transpose(-1, -2) * (k.transpose(-1, -2) @ v)
    decay = total.exp().transpose(-1, -2)
    states = []
    for index in range(q.shape[2]):
        states.append(state)
        state = decay[:, :, index] * state + added[:, :, index]
    before = r.exp().transpose(-1, -2) * torch.stack(states, dim=2)
    o = (inside + q @ before).permute(0, 2, 3, 1, 4).flatten(1, 2)
    return o[:, :length], state


def linear_attention(q, k, v, log_g, state, lower_bound, dtype):
    """(numerator [B, T, H, d], denominator [B, T, H], state [B, H, K, d + 1]) in float32; v [B, T, H, d].

    ``log_g`` None: nothing decays; ``lower_bound`` None: gates have no bound. On a GPU with fla installed, its kernel in
    ``dtype``.
    """
    v = torch.cat([v.float(), torch.ones_like(v[..., :1], dtype=torch.float32)], dim=-1)
    if log_g is None:
        log_g, chunk = q.new_zeros(()).expand(q.shape), CHUNK
    elif lower_bound is None:
        log_g, chunk = log_g.expand(q.shape), 1
    else:
        log_g = log_g.clamp(min=lower_bound).expand(q.shape)
        chunk = max(1, min(CHUNK, int(NATS / -lower_bound)))
    if fla_gla is not None and q.is_cuda and q.shape[1] > 1 and chunk > 1:
        operands = (x.to(dtype) for x in (q, k, v))
        o, state = fla_gla(*operands, log_g.contiguous(), scale=1.0, initial_state=state, output_final_state=True)
        o = o.float()
    else:
        o, state = gated_linear_attention(q, k, v, log_g, state, chunk)
    return o[..., :-1], o[..., -1], state


class Window(NamedTuple):
    """Which tokens softmax sees: ``sinks`` first ones, and the last ``size`` or, ``terraced``, the own block of ``size``
    tokens up to the current one and the whole block before."""

    size: int
    sinks: int
    terraced: bool

    @property
    def kept(self):
        """R, the tokens before the current one that the state keeps."""
        return self.size * (2 if self.terraced else 1)

    def blocks(self, length):
        """(first, how many) of the queries that are taken together."""
        block = max(self.kept, 64)
        return [(first, min(block, length - first)) for first in range(0, length, block)]

    def visible(self, first, count, context):
        """(tokens in the window, those of the last R before a terraced window): bool [B, count, R + count] for the
        queries from ``first`` and the rows that begin R before them; sinks are in neither."""
        own = torch.arange(count, device=context.start.device)
        distance = own[:, None] + self.kept - torch.arange(count + self.kept, device=own.device)
        places = (context.start[:, None] + first + own)[..., None]
        band = (distance >= 0) & (distance < self.kept) & (places - distance >= self.sinks)
        if not self.terraced:
            return band, torch.zeros_like(band)
        inside = places - distance >= (places // self.size - 1) * self.size
        return band & inside, band & ~inside


def window_attention(q, keys, values, sink_k, sink_v, window, context):
    """sum_s e^(q.k_s / sqrt(d) - m) v_s and the same with v_s = 1, m the largest score of the query, over the tokens of a
    ``window`` and the sinks; q [B, T, H, d]; keys, values [B, R + T, N, d], which begin R tokens before q."""
    heads, sinks = q.shape[2], torch.arange(window.sinks, device=q.device)
    sink_k, sink_v = (repeat_heads(x, heads).float() for x in (sink_k, sink_v))
    numerators, denominators = [], []
    for first, count in window.blocks(q.shape[1]):
        queries, rows = q[:, first : first + count].float(), slice(first, first + count + window.kept)
        near_k, near_v = (repeat_heads(x[:, rows], heads).float() for x in (keys, values))
        near, _ = window.visible(first, count, context)
        places = context.start[:, None] + first + torch.arange(count, device=q.device)
        scores = torch.einsum("bihd,bjhd->bhij", queries, torch.cat([near_k, sink_k], dim=1)) * q.shape[-1] ** -0.5
        allowed = torch.cat([near, sinks <= places[..., None]], dim=-1)
        scores = scores.masked_fill(~allowed[:, None], float("-inf"))
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        numerators.append(torch.einsum("bhij,bjhd->bihd", weights, torch.cat([near_v, sink_v], dim=1)))
        denominators.append(weights.sum(-1).transpose(1, 2))
    return torch.cat(numerators, dim=1), torch.cat(denominators, dim=1)


def linear_before_window(phi_q, phi_k, values, window, context):
    """Numerator [B, T, H, d] and denominator [B, T, H] of linear attention over those of the last R tokens that lie before
    a terraced window, which the state takes in only R tokens after them; phi_q [B, T, H, K], phi_k [B, R + T, H, K]."""
    numerators, denominators = [], []
    for first, count in window.blocks(phi_q.shape[1]):
        rows = slice(first, first + count + window.kept)
        _, before = window.visible(first, count, context)
        scores = torch.einsum("bihk,bjhk->bhij", phi_q[:, first : first + count], phi_k[:, rows])
        scores = scores.masked_fill(~before[:, None], 0)
        near_v = repeat_heads(values[:, rows], phi_q.shape[2]).float()
        numerators.append(torch.einsum("bhij,bjhd->bihd", scores, near_v))
        denominators.append(scores.sum(-1).transpose(1, 2))
    return torch.cat(numerators, dim=1), torch.cat(denominators, dim=1)


def first_rows(old, x, count, context):
    """The rows of the first ``count`` tokens of each sequence, as far as they have come."""
    if count == 0:
        return x[:, :0]
    source = torch.arange(count, device=x.device) - context.start[:, None]
    taken = x.gather(1, source.clamp(0, x.shape[1] - 1)[:, :, None, None].expand(-1, -1, *x.shape[2:]))
    limit = x.shape[1] if context.lengths is None else context.lengths[:, None]
    fresh = ((source >= 0) & (source < limit))[:, :, None, None]
    return torch.where(fresh, taken, torch.zeros_like(taken) if old is None else old.to(x))


def convolve(x, taps):
    """Causal depthwise convolution: x [B, W - 1 + T, H, d], which begins W - 1 tokens early, taps [W, H, d]."""
    length = x.shape[1] - len(taps) + 1
    y = taps[0] * x[:, :length]
    for j in range(1, len(taps)):
        y = y + taps[j] * x[:, j : j + length]
    return y


def parameter(*shape):
    return nn.Parameter(torch.zeros(*shape), requires_grad=True)


class Affine(nn.Module):
    """x kernel (+ bias), in float32; kernel [inputs, outputs]."""

    def __init__(self, inputs, outputs, bias):
        super().__init__()
        self.kernel = parameter(inputs, outputs)
        self.bias = parameter(outputs) if bias else None

    def forward(self, x):
        y = x.float() @ self.kernel.float()
        return y if self.bias is None else y + self.bias.float()


class LinearMixer(nn.Module):
    """What stands in for softmax attention in one layer: LAWCAT with its switches, or LoLCATs. All float32."""

    def __init__(self, config):
        super().__init__()
        m, a = config.lawcat["model"], config.lawcat["attention"]
        self.a, self.heads, self.kv_heads, self.width = a, m["num_heads"], m["num_kv_heads"], m["head_dim"]
        self.lawcat = a["kind"] == "lawcat"
        self.feature_map_function, copies = FEATURE_MAPS[a["feature_map"]]
        scores = a["feature_dim"] or max(1, self.width // copies)
        self.features = scores * copies
        tied = self.lawcat and a["tie_qk"]
        self.maps = ("feature_map", "feature_map") if tied else ("feature_map_q", "feature_map_k")
        for name in dict.fromkeys(self.maps):
            self.register_parameter(name, parameter(self.heads, self.width, scores))
            if a["feature_map"] == "relu":
                self.register_parameter(f"{name}_bias", parameter(self.heads))
        if a["window_size"]:
            self.window_factor = parameter(self.heads)
            self.window = Window(a["window_size"], a["sinks"], {"sliding": False, "terraced": True}[a["window_kind"]])
        if not self.lawcat:
            return
        self.taps = {  # names of the taps that q and k go through, in order
            "on": (("conv_q",), ("conv_k",)),
            "shared": (("conv_q",), ("conv_q",)),
            "stacked": (("conv_q", "conv_q2"), ("conv_k", "conv_k2")),
            "off": (),
        }[a["conv"]]
        for name in dict.fromkeys(sum(self.taps, ())):
            self.register_parameter(name, parameter(self.heads, a["conv_size"], self.width))
        gates, hidden, rank = (
            self.kv_heads * (1 if a["gate_kind"] == "per_head" else self.features),
            m["hidden_size"],
            a["gate_rank"],
        )
        if a["gate_kind"] != "none" and rank:
            self.gate_down, self.gate_up = Affine(hidden, rank, False), Affine(rank, gates, True)
        elif a["gate_kind"] != "none":
            self.gate = Affine(hidden, gates, True)
        if a["output_gate"]:
            self.output_gate = Affine(hidden, self.heads * self.width, False)

    def forward(self, x, q, k, v, context, state):
        """(output of the heads [B, T, H, d], next state); x is what the projections of q, k, v took."""
        return (self._lawcat if self.lawcat else self._lolcats)(x, q, k, v, context, state)

    def _lawcat(self, x, q, k, v, context, state):
        a, new = self.a, {}
        near = None
        if a["window_size"]:
            near, window, _ = self._window(rotate(q, context), rotate(k, context), v, context, state)
            new.update(window)
        if a["rope_linear"]:
            q, k = rotate(q, context), rotate(k, context)
        q, k, rows = self._convolved(q, k, context, state)
        new.update(rows)
        valid = context.valid()[:, :, None, None]
        phi_q, phi_k = self._phi(self.maps[0], q), self._phi(self.maps[1], k).masked_fill(~valid, 0)
        log_g = None
        if a["gate_kind"] != "none":
            logits = self.gate_up(self.gate_down(x)) if a["gate_rank"] else self.gate(x)
            log_g = F.logsigmoid(logits.unflatten(-1, (self.kv_heads, -1))) / a["gate_normalizer"]
            log_g = repeat_heads(log_g.masked_fill(~valid, 0), self.heads)
        far_n, far_d, new["S"] = linear_attention(
            phi_q, phi_k, repeat_heads(v, self.heads), log_g, state.get("S"), a["gate_lower_bound"], x.dtype
        )
        scale = self.features**-0.5  # of the authors' kernel; only without a window does the denominator cancel it
        if near is not None:
            o = self._joint(near, scale * far_n, scale * far_d)
        elif a["normalize"]:
            o = far_n / (far_d + 1e-10)[..., None]
        else:
            o = scale * far_n
        if a["output_gate"]:
            o = o * (2 * self.output_gate(x).sigmoid()).unflatten(-1, (self.heads, self.width))
        return o, new

    def _lolcats(self, x, q, k, v, context, state):
        q, k = rotate(q, context), rotate(k, context)
        near, new, (keys, values) = self._window(q, k, v, context, state)
        # What token t adds to the sums is the token R before it, unless that is a sink: it leaves the window then, or has
        # left a terraced one some tokens ago.
        length = q.shape[1]
        places = context.start[:, None] + torch.arange(length, device=q.device) - self.window.kept
        leaving = context.valid() & (places >= self.window.sinks)
        phi_q, phi_k = self._phi(self.maps[0], q), self._phi(self.maps[1], repeat_heads(keys, self.heads))
        far_n, far_d, new["S"] = linear_attention(
            phi_q,
            phi_k[:, :length].masked_fill(~leaving[:, :, None, None], 0),
            repeat_heads(values[:, :length], self.heads),
            None,
            state.get("S"),
            None,
            x.dtype,
        )
        if self.window.terraced:
            more_n, more_d = linear_before_window(phi_q, phi_k, values, self.window, context)
            far_n, far_d = far_n + more_n, far_d + more_d
        return self._joint(near, far_n, far_d), new

    def _phi(self, name, u):
        scores = torch.einsum("bthd,hdf->bthf", u.float(), getattr(self, name).float())
        bias = getattr(self, f"{name}_bias", None)
        scores = scores if bias is None else scores + bias.float()[:, None]  # one number a head
        return self.feature_map_function(scores).clamp(min=1e-12)

    def _convolved(self, q, k, context, state):
        if not self.taps:
            return q, repeat_heads(k, self.heads), {}
        rows, outputs, count = {}, [], (self.a["conv_size"] - 1) * len(self.taps[0])
        for name, x, taps in (("rows_q", q, self.taps[0]), ("rows_k", k, self.taps[1])):
            y = extend(state.get(name), x, count)
            rows[name] = last_rows(y, count, context.lengths)
            y = repeat_heads(y, self.heads).float()
            for each in taps:
                y = convolve(y, getattr(self, each).float().transpose(0, 1))
            outputs.append(y)
        return (*outputs, rows)

    def _window(self, q, k, v, context, state):
        kept, sinks = self.window.kept, self.window.sinks
        keys, values = extend(state.get("k"), k, kept), extend(state.get("v"), v, kept)
        new = {
            "k": last_rows(keys, kept, context.lengths),
            "v": last_rows(values, kept, context.lengths),
            "sink_k": first_rows(state.get("sink_k"), k, sinks, context),
            "sink_v": first_rows(state.get("sink_v"), v, sinks, context),
        }
        terms = window_attention(q, keys, values, new["sink_k"], new["sink_v"], self.window, context)
        return terms, new, (keys, values)

    def _joint(self, near, far_numerator, far_denominator):
        """Window and linear part under one denominator, with weights s and 1 (or 1 - s), s = sigmoid(factor)."""
        share = self.window_factor.float().sigmoid()
        rest = 1 - share if self.a["affine_window"] else torch.ones_like(share)
        numerator = share[:, None] * near[0] + rest[:, None] * far_numerator
        return numerator / (share * near[1] + rest * far_denominator + 1e-10)[..., None]


def softmax_attention(q, k, v, context, state, window):
    """Causal softmax attention with a cache that grows: (o [B, T, H, d], next state); q and k already rotated."""
    steps = torch.arange(q.shape[1], device=q.device)
    own = (context.start[:, None] + steps).masked_fill(~context.valid(), -1)  # -1: padding, never seen
    places = own if not state else torch.cat([state["places"], own], dim=1)
    keys, values = ((x if not state else torch.cat([state[name], x], dim=1)) for name, x in (("k", k), ("v", v)))
    reach = context.start[:, None] + steps
    seen = (places[:, None] >= 0) & (places[:, None] <= reach[..., None])
    if window is not None:
        seen &= places[:, None] > reach[..., None] - window
    seen |= steps[:, None] + places.shape[1] - q.shape[1] == torch.arange(places.shape[1], device=q.device)
    operands = (x.transpose(1, 2) for x in (q, repeat_heads(keys, q.shape[2]), repeat_heads(values, q.shape[2])))
    o = F.scaled_dot_product_attention(*operands, attn_mask=seen[:, None]).transpose(1, 2)
    new = {"k": keys, "v": values, "places": places}
    if window is not None:  # what no sequence can reach any more
        needed = (places > own.amax(1, keepdim=True) - window).any(0).nonzero()
        new = {name: x[:, int(needed[0]) :] for name, x in new.items()} if len(needed) else new
    return o, new


# Decoder


class Norm(nn.Module):
    """RMS norm, computed in float32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * y.to(x.dtype)


class Adapter(nn.Module):
    """The low-rank addition x a b to one projection."""

    def __init__(self, inputs, outputs, lora):
        super().__init__()
        self.a, self.b = parameter(inputs, lora["rank"]), parameter(lora["rank"], outputs)
        self.scale = lora["alpha"] / lora["rank"]

    def forward(self, x):
        return (x @ self.a.to(x.dtype)) @ (self.scale * self.b).to(x.dtype)


class LawcatAttention(nn.Module):
    """Projections, with their adapters, around a linear mixer or softmax attention."""

    def __init__(self, config, layer):
        super().__init__()
        m, lora = config.lawcat["model"], config.lawcat["lora"]
        self.width, self.qk_norm = m["head_dim"], m["qk_norm"]
        queries, keys, hidden = m["num_heads"] * self.width, m["num_kv_heads"] * self.width, m["hidden_size"]
        sizes = {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
        }
        for name, (inputs, outputs) in sizes.items():
            setattr(self, name, nn.Linear(inputs, outputs, bias=name in m["projection_biases"]))
        if self.qk_norm != "none":
            per_head = self.qk_norm == "head"
            self.q_norm = Norm(self.width if per_head else queries, m["rms_norm_eps"])
            self.k_norm = Norm(self.width if per_head else keys, m["rms_norm_eps"])
        linear = layer not in config.lawcat["attention"]["softmax_layers"]
        self.mixer = LinearMixer(config) if linear else None
        targets = lora["targets"] if lora and linear else ()
        self.lora = nn.ModuleDict({name: Adapter(*sizes[name], lora) for name in targets})
        self.rotated = layer not in m["nope_layers"]
        self.window = None if layer in m["full_attention_layers"] else m["sliding_window"]

    def project(self, name, x):
        y = getattr(self, name)(x)
        return y + self.lora[name](x) if name in self.lora else y

    def heads(self, y, norm=None):
        if norm is None:
            return y.unflatten(-1, (-1, self.width))
        return (
            norm(y.unflatten(-1, (-1, self.width)))
            if self.qk_norm == "head"
            else norm(y).unflatten(-1, (-1, self.width))
        )

    def forward(self, x, context, state):
        normed = self.qk_norm != "none"
        q = self.heads(self.project("q_proj", x), self.q_norm if normed else None)
        k = self.heads(self.project("k_proj", x), self.k_norm if normed else None)
        v = self.heads(self.project("v_proj", x))
        if not self.rotated:
            context = context._replace(cos=torch.ones_like(context.cos), sin=torch.zeros_like(context.sin))
        if self.mixer is not None:
            o, state = self.mixer(x, q, k, v, context, state)
        else:
            o, state = softmax_attention(rotate(q, context), rotate(k, context), v, context, state, self.window)
        return self.project("o_proj", o.to(x.dtype).flatten(-2)), state


class LawcatMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        m = config.lawcat["model"]
        sizes = {name: (m["hidden_size"], m["mlp_size"]) for name in ("gate_proj", "up_proj")}
        for name, (inputs, outputs) in {**sizes, "down_proj": (m["mlp_size"], m["hidden_size"])}.items():
            setattr(self, name, nn.Linear(inputs, outputs, bias=name in m["projection_biases"]))

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LawcatLayer(nn.Module):
    """Attention and MLP, each with a norm before it (Llama) or behind it (OLMo 2)."""

    def __init__(self, config, layer):
        super().__init__()
        m = config.lawcat["model"]
        self.index, self.after = layer, m["norm_position"] == "after"
        names = (
            ("attention_output_norm", "mlp_output_norm")
            if self.after
            else ("input_layernorm", "post_attention_layernorm")
        )
        for name in names:
            setattr(self, name, Norm(m["hidden_size"], m["rms_norm_eps"]))
        self.self_attn, self.mlp = LawcatAttention(config, layer), LawcatMLP(config)

    def forward(self, x, context, cache):
        own = None if cache is None else cache.layers[self.index]
        o, state = self.self_attn(
            x if self.after else self.input_layernorm(x), context, {} if own is None else own.state
        )
        if own is not None:
            own.replace({**state, "count": context.start + context.valid().sum(1)}, x.shape[1])
        if self.after:
            x = x + self.attention_output_norm(o)
            return x + self.mlp_output_norm(self.mlp(x))
        x = x + o
        return x + self.mlp(self.post_attention_layernorm(x))


class LawcatPreTrainedModel(PreTrainedModel):
    config_class = LawcatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ["LawcatLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    # Rounding a gate changes how long a state lives: what was trained stays float32 whatever the rest is.
    _keep_in_fp32_modules_strict = ["mixer", "lora"]  # noqa: RUF012
    _is_stateful = True  # a state cannot be rolled back: no assisted decoding
    _supports_cache_class = True
    _supports_sdpa = True


def vocab_size(config):
    """Rows of the embedding: transformers writes a resized one into the usual field."""
    return getattr(config, "vocab_size", None) or config.lawcat["model"]["vocab_size"]


_SEVERAL_DOCUMENTS = (
    "mean several documents in one row, whose states would run into each other here: give each document a row of its own, with an "
    "attention_mask for the padding"
)


class LawcatModel(LawcatPreTrainedModel):
    """The decoder without its output head."""

    def __init__(self, config):
        super().__init__(config)
        m = config.lawcat["model"]
        self.embed_tokens = nn.Embedding(vocab_size(config), m["hidden_size"])
        self.layers = nn.ModuleList([LawcatLayer(config, layer) for layer in range(m["num_layers"])])
        self.norm = Norm(m["hidden_size"], m["rms_norm_eps"])
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        past_key_values=None,
        cache=None,
        use_cache=None,
        output_hidden_states=None,
        **kwargs,
    ):
        """``attention_mask`` [B, past + T or more] or [B, T]: 0 is padding, wherever it stands. ``position_ids``, where they
        are given, count for the rotary embedding; without a mask they must count up by one, since elsewhere they
        mean several documents in a row, which this code does not keep apart."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        if any(name.startswith("cu_seq_lens") and value is not None for name, value in kwargs.items()):
            raise ValueError(f"cu_seq_lens {_SEVERAL_DOCUMENTS}")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        batch, length = x.shape[:2]
        start = None if cache is None else cache.layers[0].state.get("count")
        start = torch.zeros(batch, dtype=torch.long, device=x.device) if start is None else start.to(x.device)
        past = 0 if cache is None else cache.get_seq_length()
        order, lengths = self._packed(attention_mask, batch, length, past)
        if position_ids is None:
            position_ids = start[:, None] + torch.arange(length, device=x.device)
        else:
            position_ids = position_ids.expand(batch, -1)
            if attention_mask is None and (position_ids.diff(dim=1) != 1).any():
                raise ValueError(f"position_ids that begin again {_SEVERAL_DOCUMENTS}")
            position_ids = position_ids if order is None else position_ids.gather(1, order)
        if order is not None:
            x = x.gather(1, order[..., None].expand_as(x))
        angles = position_ids[..., None].float() * torch.tensor(self.config.lawcat["rope"], device=x.device)
        factor = self.config.lawcat["rope_factor"]
        context = Context(angles.cos() * factor, angles.sin() * factor, start, lengths)
        hidden = [x]
        for layer in self.layers:
            x = layer(x, context, cache)
            hidden.append(x)
        hidden[-1] = x = self.norm(x)
        if order is not None:
            back = order.argsort(1)[..., None]
            x, *hidden = (h.gather(1, back.expand_as(h)) for h in (x, *(hidden if output_hidden_states else ())))
        return BaseModelOutputWithPast(
            last_hidden_state=x, hidden_states=tuple(hidden) if output_hidden_states else None, **{CACHE: cache}
        )

    def _cache(self, cache, use_cache):
        if cache is None:
            # Training that does not ask for states is not to pay for them.
            wanted = not self.training and getattr(self.config, "use_cache", True) if use_cache is None else use_cache
            return LawcatCache(self.config) if wanted else None
        if not isinstance(cache, LawcatCache):  # which would stay empty in the hands of who gave it
            raise ValueError(
                f"this model keeps its state in a LawcatCache, not in a {type(cache).__name__}: give none to the first call, and to "
                "the next one that which the call before returned"
            )
        return cache

    def _packed(self, mask, batch, length, past):
        """(order that moves valid tokens to the front [B, T], or None; how many are valid [B], or None for all). ``past``
        columns were read before."""
        if mask is None:
            return None, None
        if mask.ndim != 2:
            raise ValueError(f"attention_mask should be [batch, tokens], not {list(mask.shape)}")
        rows, width = mask.shape
        if rows != batch or (width != length and width < past + length):
            raise ValueError(
                f"attention_mask should be [{batch}, {length}], of the tokens that are given, or [{batch}, {past + length}], with "
                f"those before them, not {list(mask.shape)}"
            )
        # One of a longer text than is read so far: its first columns are this far, as transformers takes them.
        mask = (mask if width == length else mask[:, past : past + length]).bool()
        if length == 1:
            return None, mask.sum(1)
        if mask.all():
            return None, None
        return (~mask).to(torch.uint8).argsort(dim=1, stable=True), mask.sum(1)


class LawcatForCausalLM(LawcatPreTrainedModel, GenerationMixin):
    """The decoder with its output head; logits are float32."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        m = config.lawcat["model"]
        self.model = LawcatModel(config)
        self.lm_head = nn.Linear(m["hidden_size"], vocab_size(config), bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Start ``generate`` from an empty state of this model's own kind, also where an empty cache of another is given."""
        for name in (CACHE, "past_key_values"):
            given = model_kwargs.get(name)
            if given is not None and not isinstance(given, LawcatCache) and not given.get_seq_length():
                del model_kwargs[name]
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = LawcatCache(self.config)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        past_key_values=None,
        cache=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Logits [B, T, V], and with ``labels`` [B, T] (-100: not counted) the loss of the next token: transformers' own, a
        mean, or a sum over ``num_items_in_batch`` where Trainer gives it; ``shift_labels`` are taken as they are."""
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need the logits of all tokens: leave logits_to_keep at 0")
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **{name: value for name, value in kwargs.items() if name.startswith("cu_seq_lens")},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=out.hidden_states, **{CACHE: getattr(out, CACHE)}
        )
        return result.to_tuple() if return_dict is False else result
