"""Decisions: estimate memory and speed, rank strategies, write a plan. No torch, no side effects."""
