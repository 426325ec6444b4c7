"""Ways to train that benchmarks/training.py compares, each behind its library's own interface, one file each.

A method is written `PEER` or `PEER:KEY=VALUE,KEY=VALUE`; the peer is a module of this package with

    OPTIONS: dict          every key that the method may set, with its default
    prepare(config, setting, options) -> Prepared

`prepare` raises `Unsupported` where the peer cannot run, with the reason; that is a result like any other.
"""
