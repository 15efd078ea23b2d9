"""Faster versions of what torch, transformers and PEFT compute, each tested against its plain twin.

Shapes: T tokens, D width, I width of the feed-forward part, H query heads of E features, K heads of
keys and values, R rank.
"""
