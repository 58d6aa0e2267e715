"""Data: what the samples are, and how ids become a `Batch`.

`interface` is what training asks of data, `batch` what it gets, `sections` the options. In memory:
`catalog`, one module a data set, `arrays`. Encoded files: `imagefolder`, `dali`, `graph`, `colour`,
`bad_images`; and `index` (`index_check`) on `index_format`, `folder`, `splits`, `headers` and
`labels`. Of both: `views`, `mix`, `transfer`; and `preprocessing`, what a network has to be given.
"""
