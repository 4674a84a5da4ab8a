"""Losses as pure functions of tensors; they call no collective and import no other room."""
