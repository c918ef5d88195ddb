"""Facts as data: models, cards, precisions. Standard library and msgspec only."""
