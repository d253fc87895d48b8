"""What the evaluate command does: problems, their answers, likelihoods, and what they say."""
