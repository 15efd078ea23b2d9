"""Faster forms of what torch, transformers and PEFT compute, each beside its plain twin.

Shapes: T tokens, D width, I width of the feed-forward part, H heads of E features, K heads of keys
and values, R rank.
"""
