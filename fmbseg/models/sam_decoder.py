"""SAM's mask decoder with the segment-anything package's weights, in fewer operations. Equal to the package's but for rounding.

The image has many positions N, a prompt few tokens T (7 for a point). So attention between the two is projected on the side of
the tokens: q (W k)' = (q W) k', and a weighted sum of W v is W times the weighted sum of v. The predicted IoU follows from the
tokens alone, so masks where it is too low are never drawn.
"""

from __future__ import annotations

import torch
from segment_anything.modeling import MaskDecoder
from segment_anything.modeling.transformer import Attention


def decode(
    decoder: MaskDecoder, image: torch.Tensor, place: torch.Tensor, prompts: torch.Tensor, grid: tuple[int, int], predicted_iou: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three masks of every prompt whose predicted IoU is over a threshold (0: all of them).

    image: (1, N, C), its embedding plus the dense prompt; place: (1, N, C), the encoding of its positions; prompts: (B, n, C)
    tokens of the prompt encoder; grid: the first rows of the N positions and all columns, (rows, columns), which are drawn.
    Returns logits (M, 4 rows, 4 columns), predicted IoU (M,) and the number of each mask's prompt (M,), in order of prompts.
    """
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    start = torch.cat([own.expand(len(prompts), -1, -1), prompts], dim=1)
    tokens = start
    for layer in decoder.transformer.layers:
        placed = image + place
        if layer.skip_first_layer_pe:
            tokens = layer.self_attn(q=tokens, k=tokens, v=tokens)
        else:
            tokens = tokens + layer.self_attn(q=tokens + start, k=tokens + start, v=tokens)
        tokens = layer.norm1(tokens)
        tokens = layer.norm2(tokens + _from_image(layer.cross_attn_token_to_image, tokens + start, placed, image))
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        image = layer.norm4(image + _to_image(layer.cross_attn_image_to_token, placed, tokens + start, tokens))
    last = decoder.transformer
    tokens = last.norm_final_attn(tokens + _from_image(last.final_attn_token_to_image, tokens + start, image + place, image))

    iou = decoder.iou_prediction_head(tokens[:, 0])[:, 1:].float()  # the first mask is for unambiguous prompts
    kept = iou > predicted_iou if predicted_iou > 0 else torch.ones_like(iou, dtype=torch.bool)
    drawn = kept.any(dim=1)
    weights = torch.stack([mlp(tokens[drawn, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps, 1) if i > 1], dim=1)
    rows, columns = grid
    upscaled = decoder.output_upscaling(image[drawn, : rows * columns].mT.unflatten(2, (rows, columns)))
    logits = (weights @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])
    return logits[kept[drawn]].float(), iou[kept], kept.nonzero()[:, 0]


def _from_image(attention: Attention, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention from tokens, (B, T, C) queries, to the image, (B or 1, N, C) keys and values: (B, T, C)."""
    (batch, count, width), heads = queries.shape, attention.num_heads
    key, value = (p.weight.view(heads, -1, width) for p in (attention.k_proj, attention.v_proj))
    q = attention.q_proj(queries).view(batch, count, heads, -1)
    similar = torch.einsum("bthd,hdc->bhtc", q, key).flatten(1, 2) / q.shape[-1] ** 0.5  # a key's bias changes no softmax
    seen = (similar @ keys.mT).softmax(dim=-1) @ values
    out = torch.einsum("bhtc,hdc->bthd", seen.view(batch, heads, count, width), value).flatten(2) + attention.v_proj.bias
    return attention.out_proj(out)


def _to_image(attention: Attention, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention from the image, (B or 1, N, C) queries, to tokens, (B, T, C) keys and values: (B, N, C)."""
    (batch, count, width), heads = keys.shape, attention.num_heads
    k, v = (p(x).view(batch, count, heads, -1) for p, x in ((attention.k_proj, keys), (attention.v_proj, values)))
    query, bias = attention.q_proj.weight.view(heads, -1, width), attention.q_proj.bias.view(heads, -1)
    similar = (
        torch.einsum("bthd,hdc->bhtc", k, query).flatten(1, 2) @ queries.mT + torch.einsum("bthd,hd->bht", k, bias).flatten(1)[..., None]
    )
    seen = (similar / k.shape[-1] ** 0.5).view(batch, heads, count, -1).softmax(dim=2).flatten(1, 2)
    out = torch.einsum("bthd,chd->bhtc", v, attention.out_proj.weight.view(width, heads, -1)) + attention.out_proj.bias / heads
    return seen.mT @ out.flatten(1, 2)
