"""Choosing a method and its settings for a budget: what may be chosen, what it costs, the search, plan.json."""
