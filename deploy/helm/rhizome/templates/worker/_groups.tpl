{{/*
Every group as its templates need it, by name: its values over the defaults, and
  model     where its weights are (rhizome.model)
  gpus      GPUs of a pod
  scaled    whether something scales it
  sets      what runs it, [{name, unit, pods, port}]: one set of all pods where a replica is one
            pod; for several nodes one set for each replica that may be there, `nodes` pods or none
Refuses what cannot run, naming the group.
*/}}
{{- define "rhizome.groups" -}}
{{- $groups := .Values.worker.groups | default (dict "main" dict) -}}
{{- $lws := .Values.worker.leaderWorkerSet.enabled -}}
{{- $resolved := dict -}}
{{- $names := dict -}}
{{- $ranges := list -}}
{{- $block := 0 -}}
{{- range $name := keys $groups | sortAlpha -}}
{{- $group := mergeOverwrite (deepCopy $.Values.worker.groupDefaults) (deepCopy (get $groups $name | default dict)) -}}
{{- $where := printf "worker.groups.%s" $name -}}
{{- $tp := int $group.tp -}}
{{- $nodes := int $group.nodes -}}
{{- $spans := gt $nodes 1 -}}

{{- /* The model and its devices. */ -}}
{{- $source := $group.model | default $.Values.model -}}
{{- $served := $group.servedModelName | default (ternary "" $.Values.servedModelName (ne $group.model "")) -}}
{{- $model := include "rhizome.model" (dict "model" $source "name" $served) | fromYaml -}}
{{- $device := $group.device | default (eq $source "builtin" | ternary "cpu" "cuda") -}}
{{- if mod $tp $nodes -}}
{{- fail (printf "%s: tp %d cannot be divided over %d nodes" $where $tp $nodes) -}}
{{- end -}}
{{- $perNode := div $tp $nodes | int -}}
{{- $gpus := eq $device "cpu" | ternary 0 $perNode -}}
{{- if and (not (kindIs "invalid" $group.gpusPerNode)) (ne (int $group.gpusPerNode) $gpus) -}}
{{- fail (printf "%s: gpusPerNode is %d, but tp %d over %d nodes takes %d on each (device %s)" $where (int $group.gpusPerNode) $tp $nodes $gpus $device) -}}
{{- end -}}

{{- /* How many replicas, and who decides it. */ -}}
{{- $hasMin := not (kindIs "invalid" $group.minReplicas) -}}
{{- $scaled := not (kindIs "invalid" $group.maxReplicas) -}}
{{- if ne $hasMin $scaled -}}
{{- fail (printf "%s: minReplicas and maxReplicas go together" $where) -}}
{{- end -}}
{{- $replicas := int $group.replicas -}}
{{- $max := $replicas -}}
{{- if $scaled -}}
{{- $max = int $group.maxReplicas -}}
{{- if gt (int $group.minReplicas) $max -}}
{{- fail (printf "%s: minReplicas %d is above maxReplicas %d" $where (int $group.minReplicas) $max) -}}
{{- end -}}
{{- $replicas = min (max $replicas (int $group.minReplicas)) $max | int -}}
{{- if and $spans (not $lws) (ne $.Values.worker.autoscaling.by "controller") -}}
{{- fail (printf "%s: worker.autoscaling.by %s cannot scale replicas of %d nodes; use controller, or leaderWorkerSet.enabled" $where $.Values.worker.autoscaling.by $nodes) -}}
{{- end -}}
{{- end -}}

{{- if and $spans (not $lws) (not $.Values.controller.enabled) -}}
{{- fail (printf "%s: replicas of %d nodes need the controller, which restarts their pods as one; set controller.enabled, or leaderWorkerSet.enabled" $where $nodes) -}}
{{- end -}}

{{- /* Ports: on the host network no two sets may have one in common, since any two may meet. */ -}}
{{- $manySets := and $spans (not $lws) -}}
{{- $numSets := $manySets | ternary $max 1 -}}
{{- $hostNetwork := kindIs "invalid" $group.hostNetwork | ternary $spans $group.hostNetwork -}}
{{- $port := 30040 -}}
{{- if $hostNetwork -}}
{{- $port = add (int $.Values.worker.hostPortBase) (mul 100 $block) | int -}}
{{- $block = add1 $block -}}
{{- $last := add $port (mul 4 $numSets) -1 | int -}}
{{- if not (kindIs "invalid" $group.hostPort) -}}
{{- $port = int $group.hostPort -}}
{{- $last = add $port (mul 4 $numSets) -1 | int -}}
{{- else if gt $numSets 25 -}}
{{- fail (printf "%s: %d replicas need %d ports of the host network; give it a hostPort with room for them" $where $numSets (mul 4 $numSets)) -}}
{{- end -}}
{{- if gt $last 65535 -}}
{{- fail (printf "%s: ports %d to %d of the host network go beyond 65535" $where $port $last) -}}
{{- end -}}
{{- range $other := $ranges -}}
{{- if and (le $port (int $other.last)) (ge $last (int $other.first)) -}}
{{- fail (printf "%s: ports %d to %d of the host network are also those of worker.groups.%s (%d to %d); give one of the two another hostPort" $where $port $last $other.name (int $other.first) (int $other.last)) -}}
{{- end -}}
{{- end -}}
{{- $ranges = append $ranges (dict "name" $name "first" $port "last" $last) -}}
{{- else if not (kindIs "invalid" $group.hostPort) -}}
{{- fail (printf "%s: hostPort is for the host network, which is off" $where) -}}
{{- end -}}

{{- $sets := list -}}
{{- $set := include "rhizome.component" (list $ (printf "worker-%s" $name)) -}}
{{- range $unit := until (int $numSets) -}}
{{- $setName := $manySets | ternary (printf "%s-%d" $set $unit) $set -}}
{{- if gt (len $setName) 52 -}}
{{- fail (printf "%s: the name %s is longer than the 52 characters that a StatefulSet's pods allow" $where $setName) -}}
{{- end -}}
{{- if hasKey $names $setName -}}
{{- fail (printf "%s: the name %s is also that of worker.groups.%s" $where $setName (get $names $setName)) -}}
{{- end -}}
{{- $_ := set $names $setName $name -}}
{{- $pods := $manySets | ternary (lt $unit $replicas | ternary $nodes 0) $replicas -}}
{{- $sets = append $sets (dict "name" $setName "unit" $unit "pods" $pods "port" (add $port (mul 4 $unit))) -}}
{{- end -}}
{{- $_ := mergeOverwrite $group (dict "name" $name "device" $device "gpus" $gpus "scaled" $scaled "spans" $spans "lws" (and $spans $lws) "hostNetwork" $hostNetwork "sets" $sets) -}}
{{- $_ := set $group "model" $model -}}
{{- $_ := set $resolved $name $group -}}
{{- end -}}
{{- toYaml $resolved -}}
{{- end }}

{{/* (list $ group): labels of a group's objects. */}}
{{- define "rhizome.groupSelectorLabels" -}}
{{ include "rhizome.selectorLabels" (list (index . 0) "worker") }}
rhizome.ai/group: {{ (index . 1).name }}
{{- end }}

{{/* Names of the models that are served. */}}
{{- define "rhizome.servedModels" -}}
{{- $names := list -}}
{{- range $group := include "rhizome.groups" . | fromYaml -}}
{{- $names = append $names $group.model.name -}}
{{- end -}}
{{- $names | uniq | toJson -}}
{{- end }}
