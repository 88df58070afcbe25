"""For people who approve: questions, grants, actions, reviews of break glass."""
