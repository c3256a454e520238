"""Clusters of the lab's account that are there for this scenario alone: `make`, `rotate` (another CA), `remove`."""

from __future__ import annotations

import contextlib
import sys

from botocore.exceptions import ClientError

from lab.aws import seed

NAMES = ("of-a-test-one", "of-a-test-two")


def remove(name: str) -> None:
    with contextlib.suppress(ClientError):
        seed.client("eks").delete_cluster(name=name)


def make(name: str) -> None:
    network = {"subnetIds": ["subnet-1"], "endpointPublicAccess": False, "endpointPrivateAccess": True}
    seed.client("eks").create_cluster(
        name=name, version="1.33", roleArn="arn:aws:iam::084375578827:role/eks", resourcesVpcConfig=network
    )


if __name__ == "__main__":
    what = sys.argv[1]
    # EKS rotates the authority of a cluster that goes on; the lab's has a new one when it is made again.
    for cluster in NAMES[:1] if what == "rotate" else NAMES:
        remove(cluster)
        if what != "remove":
            make(cluster)
