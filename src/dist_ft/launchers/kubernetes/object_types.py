"""Types of the objects of Kubernetes and KubeRay, with the keys that this package reads or writes.

They describe dicts from YAML or `kubectl -o json`. Every key may be missing; other keys are passed on unchanged.
"""

from __future__ import annotations

from typing import TypedDict

Quantities = dict[str, str | int]
"""Resources of a container: name → `500m`, `1Gi`, a number."""


class Metadata(TypedDict, total=False):
    name: str
    namespace: str
    labels: dict[str, str]
    annotations: dict[str, str]


class ValueSource(TypedDict, total=False):
    secretKeyRef: dict[str, str]


class Variable(TypedDict, total=False):
    name: str
    value: str
    valueFrom: ValueSource


class Resources(TypedDict, total=False):
    requests: Quantities
    limits: Quantities


class SecurityContext(TypedDict, total=False):
    runAsNonRoot: bool
    runAsUser: int
    seccompProfile: dict[str, str]
    capabilities: dict[str, list[str]]


class Command(TypedDict, total=False):
    command: list[str]


class Hook(TypedDict, total=False):
    exec: Command


class Lifecycle(TypedDict, total=False):
    preStop: Hook


class Mount(TypedDict, total=False):
    name: str
    mountPath: str


class Container(TypedDict, total=False):
    name: str
    image: str
    env: list[Variable]
    resources: Resources
    securityContext: SecurityContext
    lifecycle: Lifecycle
    volumeMounts: list[Mount]


class Volume(TypedDict, total=False):
    name: str
    persistentVolumeClaim: dict[str, str]
    configMap: dict[str, str]
    emptyDir: dict[str, str]


class PodSpec(TypedDict, total=False):
    initContainers: list[Container]
    containers: list[Container]
    volumes: list[Volume]
    securityContext: SecurityContext
    hostNetwork: bool
    hostPID: bool
    hostIPC: bool
    terminationGracePeriodSeconds: float
    restartPolicy: str


class PodTemplate(TypedDict, total=False):
    metadata: Metadata
    spec: PodSpec


class Group(TypedDict, total=False):
    """The head, or a group of equal workers."""

    groupName: str
    template: PodTemplate
    rayStartParams: dict[str, str]
    resources: Quantities
    replicas: int
    minReplicas: int
    maxReplicas: int


class AutoscalerOptions(Container, total=False):
    version: str
    idleTimeoutSeconds: int


class ClusterSpec(TypedDict, total=False):
    """The spec of a RayCluster, which a RayJob and a RayService hold as well."""

    rayVersion: str
    authOptions: dict[str, str]
    headGroupSpec: Group
    workerGroupSpecs: list[Group]
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    gcsFaultToleranceOptions: dict[str, str]


class DeletionStrategy(TypedDict, total=False):
    deletionRules: list[dict[str, str]]


class VolumeClaimTemplate(TypedDict, total=False):
    metadata: Metadata


class Spec(ClusterSpec, total=False):
    """The spec of any kind: keys of KubeRay's objects, of a StatefulSet, and of objects that select pods."""

    entrypoint: str
    entrypointNumCpus: float
    runtimeEnvYAML: str
    submissionMode: str
    submitterPodTemplate: PodTemplate
    rayClusterSpec: ClusterSpec
    rayClusterConfig: ClusterSpec
    serveConfigV2: str
    upgradeStrategy: dict[str, str]
    rayClusterDeletionDelaySeconds: int
    clusterSelector: dict[str, str]
    suspend: bool
    shutdownAfterJobFinishes: bool
    deletionStrategy: DeletionStrategy
    backoffLimit: int
    ttlSecondsAfterFinished: int
    activeDeadlineSeconds: int
    preRunningDeadlineSeconds: int
    template: PodTemplate
    volumeClaimTemplates: list[VolumeClaimTemplate]
    selector: dict[str, dict[str, str]]
    podSelector: dict[str, dict[str, str]]


class RayJobStatus(TypedDict, total=False):
    jobDeploymentStatus: str
    jobStatus: str
    jobId: str
    message: str
    rayClusterName: str


class Manifest(TypedDict, total=False):
    """One object of any kind."""

    kind: str
    metadata: Metadata
    spec: Spec
    data: dict[str, str]
    status: RayJobStatus
