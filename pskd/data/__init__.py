"""Data: what the samples are, and how ids become a `Batch`.

In memory: `catalog`, one module a data set, `arrays`. Encoded files: `imagefolder`, `dali`,
`graph`, `colour`; and `index` (`index_check`) on `index_format`, `folder`,
`headers` and `labels`.
"""
