{{/*
(dict "root" $ "group" <of rhizome.groups> "set" <of its sets>): the pod template of a group's
workers, whoever makes the pods.
*/}}
{{- define "rhizome.workerPod" -}}
{{- $root := .root -}}
{{- $group := .group -}}
{{- $port := int .set.port -}}
{{- $fields := dict
      "listen" (printf "0.0.0.0:%d" $port) "advertise_address" (printf "$(POD_IP):%d" $port)
      "health_port" (add1 $port) "metrics_port" (add $port 2)
      "scheduler" (include "rhizome.schedulers" $root) "worker_id" "$(POD_NAME)"
      "role" $group.role "device" $group.device "served_model_name" $group.model.name -}}
{{- if eq $group.device "cuda" }}{{ $_ := set $fields "kernel_cache_dir" "/kernel-cache" }}{{ end -}}
{{- with $group.model.path }}{{ $_ := set $fields "model_path" . }}{{ end -}}
{{- with $root.Values.chatTemplate }}{{ $_ := set $fields "chat_template" . }}{{ end -}}
{{- with $group.labels -}}
{{- $labels := list -}}
{{- range $key, $value := . }}{{ $labels = append $labels (printf "%s=%s" $key $value) }}{{ end -}}
{{- $_ := set $fields "label" $labels -}}
{{- end -}}
{{- if gt (int $group.tp) 1 }}{{ $_ := set $fields "tp_size" (int $group.tp) }}{{ end -}}
{{- if $group.spans -}}
{{- $_ := set $fields "nnodes" (int $group.nodes) -}}
{{- if not $group.lws -}}
{{- $_ := set $fields "nccl_init_addr" (printf "%s-0.%s.%s.svc:%d" .set.name .set.name $root.Release.Namespace (add $port 3)) -}}
{{- end -}}
{{- end -}}
metadata:
  labels:
    {{- include "rhizome.podLabels" (list $root "worker") | nindent 4 }}
    rhizome.ai/group: {{ $group.name }}
    {{- if and $group.spans (not $group.lws) }}
    rhizome.ai/unit: {{ .set.unit | quote }}
    {{- end }}
  {{- with include "rhizome.podAnnotations" (dict "root" $root "values" $group "metricsPort" (add $port 2)) | trim }}
  {{- . | nindent 2 }}
  {{- end }}
spec:
  {{- include "rhizome.podSpec" (dict "root" $root "values" $group) | nindent 2 }}
  {{- include "rhizome.workerPlacement" . | nindent 2 }}
  {{- with $group.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  automountServiceAccountToken: false
  {{- if $group.hostNetwork }}
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  # The longest drain, and what is left to close.
  terminationGracePeriodSeconds: {{ add (ceil $group.config.drain_timeout_s) 30 }}
  {{- $image := include "rhizome.image" (list $root (eq $group.device "cpu" | ternary "worker-cpu" "worker") $group.image) }}
  {{- if or (eq $group.model.kind "hub") (eq $group.device "cuda") }}
  initContainers:
    {{- if eq $group.device "cuda" }}
    # The kernels that the image ships, where new ones may join them. Replaced, not overwritten: with
    # a cache on the node another worker may be running those that are there.
    - name: copy-kernels
      image: {{ $image }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: [cp, --recursive, --remove-destination, /kernels/., /kernel-cache]
      securityContext:
        {{- include "rhizome.containerSecurity" $root | nindent 8 }}
      volumeMounts:
        - name: kernels
          mountPath: /kernel-cache
    {{- end }}
    {{- if eq $group.model.kind "hub" }}
    -
      {{- include "rhizome.modelDownload" (dict "root" $root "model" $group.model "filesOnly" false) | nindent 6 }}
    {{- end }}
  {{- end }}
  containers:
    - name: worker
      image: {{ $image }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      {{- if or $group.lws $group.args }}
      args:
        {{- if $group.lws }}
        # Known to the pod only.
        - --nccl-init-addr=$(LWS_LEADER_ADDRESS):{{ add $port 3 }}
        {{- end }}
        {{- with $group.args }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- end }}
      env:
        {{- include "rhizome.env" (dict "root" $root "service" "worker" "fields" $fields "config" $group.config) | nindent 8 }}
        {{- if $group.spans }}
        - name: RHIZOME__WORKER__NODE_RANK
          valueFrom:
            fieldRef:
              fieldPath: metadata.labels['{{ $group.lws | ternary "leaderworkerset.sigs.k8s.io/worker-index" "apps.kubernetes.io/pod-index" }}']
        {{- end }}
        {{- with $group.nccl.socketInterface }}
        - name: NCCL_SOCKET_IFNAME
          value: {{ . | quote }}
        - name: GLOO_SOCKET_IFNAME
          value: {{ . | quote }}
        {{- end }}
        {{- with $group.nccl.ibHca }}
        - name: NCCL_IB_HCA
          value: {{ . | quote }}
        {{- end }}
        {{- if not (kindIs "invalid" $group.nccl.ibDisable) }}
        - name: NCCL_IB_DISABLE
          value: {{ $group.nccl.ibDisable | ternary "1" "0" | quote }}
        {{- end }}
        {{- with $group.nccl.debug }}
        - name: NCCL_DEBUG
          value: {{ . | quote }}
        {{- end }}
        {{- range $name, $value := $group.env }}
        - name: {{ $name }}
          value: {{ $value | quote }}
        {{- end }}
        {{- with $group.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        {{- $names := list "grpc" "health" "metrics" }}
        {{- if $group.spans }}{{ $names = append $names "nccl" }}{{ end }}
        {{- range $offset, $name := $names }}
        {{- if $group.hostNetwork }}
        {{- /* hostPort: the scheduler puts no two pods that want it on one node. */}}
        - {name: {{ $name }}, containerPort: {{ add $port $offset }}, hostPort: {{ add $port $offset }}}
        {{- else }}
        - {name: {{ $name }}, containerPort: {{ add $port $offset }}}
        {{- end }}
        {{- end }}
      # Serving: loaded, all ranks took part in a step, a scheduler took it. No liveness probe: a
      # worker whose engine or ranks are gone or hang ends by itself.
      startupProbe:
        grpc: {port: {{ add1 $port }}}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: {{ div (int $group.startupSeconds) 5 | max 1 }}
      readinessProbe:
        grpc: {port: {{ add1 $port }}}
        periodSeconds: 5
        timeoutSeconds: 5
      securityContext:
        {{- include "rhizome.containerSecurity" $root | nindent 8 }}
          {{- if $group.nccl.ipcLock }}
          add: [IPC_LOCK]
          {{- end }}
      {{- $resources := deepCopy $group.resources }}
      {{- if $group.gpus }}
      {{- $gpus := dict $group.gpuResource (int $group.gpus) }}
      {{- $resources = mergeOverwrite $resources (dict "requests" $gpus "limits" $gpus) }}
      {{- end }}
      {{- with $resources }}
      resources:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        {{- include "rhizome.mounts" (dict "root" $root "values" $group) | nindent 8 }}
        - name: shm
          mountPath: /dev/shm
        {{- if eq $group.device "cuda" }}
        - name: kernels
          mountPath: /kernel-cache
        {{- end }}
        {{- with include "rhizome.modelMount" (dict "model" $group.model) | trim }}
        {{- . | nindent 8 }}
        {{- end }}
  volumes:
    {{- include "rhizome.volumes" (dict "root" $root "values" $group) | nindent 4 }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ $group.shmSize }}
    {{- if eq $group.device "cuda" }}
    - name: kernels
      {{- with $root.Values.worker.kernelCacheHostPath }}
      hostPath:
        path: {{ . | quote }}
        type: DirectoryOrCreate
      {{- else }}
      emptyDir: {}
      {{- end }}
    {{- end }}
    {{- with include "rhizome.modelVolume" (dict "root" $root "model" $group.model "filesOnly" false) | trim }}
    {{- . | nindent 4 }}
    {{- end }}
{{- end }}

{{/* One pod of a unit on a node, all on nodes that share topologyKey; other groups spread. */}}
{{- define "rhizome.workerPlacement" -}}
{{- $group := .group -}}
{{- if $group.spans -}}
{{- $affinity := deepCopy $group.affinity -}}
{{- $labels := dict "app.kubernetes.io/instance" .root.Release.Name "rhizome.ai/group" $group.name -}}
{{- if not $group.lws }}{{ $_ := set $labels "rhizome.ai/unit" (toString .set.unit) }}{{ end -}}
{{- $unit := dict "labelSelector" (dict "matchLabels" $labels) -}}
{{- if $group.lws }}{{ $_ := set $unit "matchLabelKeys" (list "leaderworkerset.sigs.k8s.io/group-key") }}{{ end -}}
{{- $apart := merge (dict "topologyKey" "kubernetes.io/hostname") $unit -}}
{{- $required := "requiredDuringSchedulingIgnoredDuringExecution" -}}
{{- $anti := dig "podAntiAffinity" dict $affinity -}}
{{- $_ := set $anti $required (append (dig $required list $anti) $apart) -}}
{{- $_ := set $affinity "podAntiAffinity" $anti -}}
{{- with $group.topologyKey -}}
{{- $together := merge (dict "topologyKey" .) $unit -}}
{{- $pod := dig "podAffinity" dict $affinity -}}
{{- $_ := set $pod $required (append (dig $required list $pod) $together) -}}
{{- $_ := set $affinity "podAffinity" $pod -}}
{{- end -}}
affinity:
  {{- toYaml $affinity | nindent 2 }}
{{- with $group.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- else -}}
{{- include "rhizome.spread" (dict "root" .root "component" "worker" "values" $group) -}}
{{- end }}
{{- end }}
