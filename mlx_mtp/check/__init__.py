"""The lossless check: does drafting change a text on this machine, with this checkpoint?

    prompts ──▶ sweep: the engine, for each number of rows and drafts ──▶ replay: plain decoding judges each token
                                                                              └──▶ report: table, JSON, verdict
"""
