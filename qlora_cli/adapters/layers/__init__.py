"""Modules that the adapter methods add to a model, where PEFT has none."""
