"""The loop of plain_loop.py in processes that torchrun starts, for tools that insist on it.

    torchrun --standalone --nproc-per-node 2 examples/with_torchrun.py

The worker that `join` gives is the one that `launch` gives to its function. The block ends when all workers have come
to its end; then every process has the center.
"""

import argparse

from plain_loop import network, scores, train

import easgd_local as easgd

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training pictures")
    options = parser.parse_args()

    with easgd.join() as worker:
        train(worker, options.epochs)

    if worker.rank == 0:
        model = network()
        model.load_state_dict(worker.center)
        print(f"test error: {scores(model)['test_error']:.1%}")
        print(f"run folder: {worker.center.folder}")
