{{/* Where a model comes from: its path in the pods, the volume it lies in, who downloads it. */}}

{{/* (dict "model" "org/name" "name" ""): {kind, path, name, claim, repo, revision} as YAML. */}}
{{- define "rhizome.model" -}}
{{- $model := .model -}}
{{- $out := dict -}}
{{- if eq $model "builtin" -}}
{{- $out = dict "kind" "builtin" "name" "builtin" -}}
{{- else if hasPrefix "pvc://" $model -}}
{{- $parts := splitn "/" 2 (trimPrefix "pvc://" $model | trimSuffix "/") -}}
{{- $path := printf "/model/%s" ($parts._1 | default "") | trimSuffix "/" -}}
{{- $out = dict "kind" "claim" "claim" $parts._0 "path" $path "name" (base $path) -}}
{{- else if hasPrefix "/" $model -}}
{{- $out = dict "kind" "host" "path" (trimSuffix "/" $model) "name" (base $model) -}}
{{- else -}}
{{- $id := splitn "@" 2 (trimPrefix "hf://" $model) -}}
{{- if not (regexMatch "^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$" $id._0) -}}
{{- fail (printf "model %q must be builtin, org/name or hf://org/name@revision, pvc://claim/path, or a path that begins with /" $model) -}}
{{- end -}}
{{- $directory := $id._0 | replace "/" "--" -}}
{{- if $id._1 }}{{ $directory = printf "%s--%s" $directory ($id._1 | replace "/" "--") }}{{ end -}}
{{- $out = dict "kind" "hub" "repo" $id._0 "revision" ($id._1 | default "main") "path" (printf "/models/%s" $directory) "name" $id._0 -}}
{{- end -}}
{{- with .name }}{{ $_ := set $out "name" . }}{{ end -}}
{{- toYaml $out -}}
{{- end }}

{{/* (dict "root" $ "model" <parsed> "filesOnly" true): the initContainer that downloads. */}}
{{- define "rhizome.modelDownload" -}}
{{- $cache := .root.Values.modelCache -}}
name: download-model
image: {{ include "rhizome.image" (list .root "download" $cache.image) }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
args:
  - download
  - {{ .model.repo | quote }}
  - {{ printf "--revision=%s" .model.revision | quote }}
  - {{ printf "--local-dir=%s" .model.path | quote }}
{{- range $pattern := concat (list "*.json" "*.jinja" "*.model" "merges.txt") (.filesOnly | ternary list (list "*.safetensors")) }}
  - {{ printf "--include=%s" $pattern | quote }}
{{- end }}
env:
  - {name: HOME, value: /tmp}
{{- with $cache.endpoint }}
  - name: HF_ENDPOINT
    value: {{ . | quote }}
{{- end }}
{{- if $cache.tokenSecret.name }}
  - name: HF_TOKEN
    valueFrom:
      secretKeyRef:
        name: {{ $cache.tokenSecret.name }}
        key: {{ $cache.tokenSecret.key }}
{{- end }}
securityContext:
  {{- include "rhizome.containerSecurity" . | nindent 2 }}
{{- with $cache.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  - {name: models, mountPath: /models}
{{- end }}

{{- define "rhizome.modelMount" -}}
{{- if eq .model.kind "claim" }}
- name: models
  mountPath: /model
  readOnly: true
{{- else if eq .model.kind "host" }}
- name: models
  mountPath: {{ .model.path | quote }}
  readOnly: true
{{- else if eq .model.kind "hub" }}
- name: models
  mountPath: /models
  readOnly: true
{{- end }}
{{- end }}

{{/* Tokenizers take a few files only (`filesOnly`), so that they need no part in the cache. */}}
{{- define "rhizome.modelVolume" -}}
{{- $cache := .root.Values.modelCache -}}
{{- $claim := $cache.existingClaim -}}
{{- if $cache.claim.create }}{{ $claim = include "rhizome.component" (list .root "models") }}{{ end -}}
{{- if gt (len (compact (list $cache.existingClaim $cache.hostPath ($cache.claim.create | ternary "claim" "")))) 1 -}}
{{- fail "modelCache: give one of existingClaim, claim.create and hostPath" -}}
{{- end -}}
{{- if eq .model.kind "claim" }}
- name: models
  persistentVolumeClaim:
    claimName: {{ .model.claim }}
    readOnly: true
{{- else if eq .model.kind "host" }}
- name: models
  hostPath:
    path: {{ .model.path | quote }}
    type: Directory
{{- else if eq .model.kind "hub" }}
- name: models
{{- if .filesOnly }}
  emptyDir: {}
{{- else if $claim }}
  persistentVolumeClaim:
    claimName: {{ $claim }}
{{- else if $cache.hostPath }}
  hostPath:
    path: {{ $cache.hostPath | quote }}
    type: DirectoryOrCreate
{{- else }}
  emptyDir: {{ empty $cache.sizeLimit | ternary dict (dict "sizeLimit" $cache.sizeLimit) | toJson }}
{{- end }}
{{- end }}
{{- end }}
