"""Whoever explains features and judges explanations, and how far they are to be believed.

A `judge` is a `language_model` on a server or `offline` (`properties` of `tokens`, meanings by `embedding`,
and `reading` of what explanations ask for);
`self_test` asks it about cases with known answers. What models are asked and how they are read is in `prompts` and
`completion`. A `client` asks each question once, with an `answer_cache` and within a budget (`spending`); `server`
speaks the protocol, `local_server` is one on this machine. `mixed` puts two kinds of cases into one question,
`measures` are the statistics.
"""
