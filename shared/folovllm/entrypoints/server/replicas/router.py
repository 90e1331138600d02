"""The prefix policy as a request router of Ray Serve."""

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .prefix_routing import PrefixPolicy


class PrefixRouter(RequestRouter):
    """Ray Serve tells it which replicas there are, the policy decides.

    The argument of `DeploymentHandle.choose_replica` is a `Placement`, which stays in the process
    of the front, as this router does.
    """

    def initialize_state(self, max_load_gap: int) -> None:
        self._policy = PrefixPolicy(max_load_gap)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._policy.keep_only(_name(replica.replica_id) for replica in replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._policy.keep_only(map(_name, self.curr_replicas))

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        by_name = {_name(replica.replica_id): replica for replica in candidate_replicas}
        if pending_request is None or not by_name:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # where nobody takes it
        (placement,) = pending_request.args
        return [[by_name[name]] for name in self._policy.place(placement, list(by_name))]


def _name(replica_id: ReplicaID) -> str:
    return str(replica_id.unique_id)
