"""Speculative decoding: several tokens a pass, guessed beforehand and checked by the model itself.

transformers' assisted generation checks the guesses (`generation/utils.py`, `_assisted_decoding`); what is
here makes them and picks how many: from the text so far (`lookup`) or by a smaller model (`draft_model`).
"""
