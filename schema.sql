-- The whole database side of timedb. `timedb create tables` runs the sections that it needs in one transaction, with
-- search_path set to the schema that was asked for; `--dry-run` prints what would run on an empty database.
-- Every statement is safe to repeat. :schema and :app_role stand for quoted identifiers from the command line.
--
-- Nothing here is ever updated or deleted but users_table: a correction is a further row. tenant_id leads every key,
-- so that one tenant's rows lie together, and so that the tables can be distributed by tenant.

-- section: begin
-- Two at once would race for the same names; so the second waits, and then finds everything there.
SELECT pg_advisory_xact_lock(hashtextextended('timedb create tables', 0));
SET LOCAL search_path = :schema;
DO $timedb$ BEGIN
    CREATE SCHEMA :schema;
EXCEPTION WHEN duplicate_schema OR insufficient_privilege THEN NULL;  -- it is there, or what follows says that it is not
END $timedb$;

-- section: tables
-- One row per upload.
CREATE TABLE IF NOT EXISTS runs_table (
    tenant_id       uuid        NOT NULL,
    run_id          uuid        NOT NULL,
    run_order       bigint      NOT NULL GENERATED ALWAYS AS IDENTITY,  -- decides between runs of one known_time
    workflow_id     text        NOT NULL,
    run_start_time  timestamptz NOT NULL,
    run_finish_time timestamptz,
    known_time      timestamptz NOT NULL,
    run_params      json        CHECK (json_typeof(run_params) = 'object'),
    rows_inserted   integer     NOT NULL,
    request_digest  bytea       NOT NULL CHECK (octet_length(request_digest) = 32),  -- tells a retry from another request
    changed_by      text,
    inserted_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, run_id)
);
CREATE INDEX IF NOT EXISTS runs_by_known_time ON runs_table (tenant_id, known_time, run_order);

CREATE TABLE IF NOT EXISTS series_table (
    tenant_id   uuid        NOT NULL,
    series_id   uuid        NOT NULL DEFAULT gen_random_uuid(),
    series_key  text        NOT NULL,
    unit        text        NOT NULL,
    description text,
    inserted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, series_id),
    UNIQUE (tenant_id, series_key)
);

-- One row holds consecutive values of one series from one run (a block), or one corrected value. The span is bounded
-- so that a window is a plain range on the primary key, whose cost does not grow with the history around it.
CREATE TABLE IF NOT EXISTS values_table (
    tenant_id       uuid          NOT NULL,
    series_id       uuid          NOT NULL,
    run_id          uuid          NOT NULL,
    value_id        bigint        NOT NULL GENERATED ALWAYS AS IDENTITY,
    run_order       bigint        NOT NULL,  -- copied from the run, as known_time is: reads need no join
    version         integer       NOT NULL CHECK (version >= 1),
    known_time      timestamptz   NOT NULL,
    change_time     timestamptz   NOT NULL,
    valid_from      timestamptz   NOT NULL,  -- the first and the last of valid_times
    valid_to        timestamptz   NOT NULL,
    changed_by      text,
    annotation      text,
    tags            text[],
    valid_times     timestamptz[] NOT NULL,  -- ascending
    valid_time_ends timestamptz[],           -- NULL when every value is a point
    "values"        float8[]      NOT NULL,
    PRIMARY KEY (tenant_id, series_id, valid_from, value_id),
    FOREIGN KEY (tenant_id, run_id) REFERENCES runs_table,
    FOREIGN KEY (tenant_id, series_id) REFERENCES series_table,
    CHECK (valid_to >= valid_from AND valid_to <= valid_from + interval '768 hours'),
    CHECK (valid_from = valid_times[1] AND valid_to = valid_times[cardinality(valid_times)]),
    CHECK (cardinality("values") BETWEEN 1 AND 1000 AND cardinality(valid_times) = cardinality("values")
           AND cardinality(valid_time_ends) = cardinality("values"))
);

-- What a flat read shows, one row per value, for SQL tools.
CREATE OR REPLACE VIEW current_values AS
SELECT DISTINCT ON (v.tenant_id, v.series_id, e.valid_time, e.valid_time_end)
       v.tenant_id, v.series_id, s.series_key, s.unit, e.valid_time, e.valid_time_end, v.known_time, e.value,
       v.annotation, v.tags, v.changed_by, v.change_time, v.run_id, v.version
FROM values_table v JOIN series_table s USING (tenant_id, series_id)
CROSS JOIN LATERAL unnest(v.valid_times, v.valid_time_ends, v."values") AS e (valid_time, valid_time_end, value)
ORDER BY v.tenant_id, v.series_id, e.valid_time, e.valid_time_end, v.known_time DESC, v.run_order DESC, v.version DESC;

-- A timestamp as the API writes it: in UTC, with six digits of fraction or none.
CREATE OR REPLACE FUNCTION iso_time(t timestamptz) RETURNS text STABLE
RETURN replace(to_char(t AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US'), '.000000', '') || '+00:00';

-- PUT /values: finds for each update the element that it corrects, by the same order as current_values, or the run that
-- gains one; of updates of one value keeps the last; stores those that change something as a next version. Members of an
-- update are those of the request, with series_id in place of series_key. All or nothing: SQLSTATE TD404 and TD422 say
-- why not. width_bucket is a binary search in a sorted array.
CREATE OR REPLACE FUNCTION correct_values(tenant uuid, author text, updates jsonb, OUT answer json) LANGUAGE plpgsql AS $timedb$
BEGIN
    -- Corrections within a tenant wait for each other, so that each sees the one before. This lock needs no UPDATE
    -- privilege. Two tenants with the same hash would merely wait.
    PERFORM pg_advisory_xact_lock(hashtextextended(tenant::text, 0));
    WITH next AS (
        SELECT DISTINCT ON (u.series_id, r.run_id, u.valid_time, u.valid_time_end) i.number, u.series_id, u.valid_time,
               u.valid_time_end, num_nonnulls(u.run_id, u.known_time) > 0 AS names_run, r.run_id, r.run_order, r.known_time,
               n.*, (n.value, n.annotation, n.tags) IS DISTINCT FROM (e.value, e.annotation, e.tags) AS differs,
               e.version AS old_version, e.version IS NULL AND NOT bool_and(item ? 'value')
                   OVER (PARTITION BY u.series_id, r.run_id, u.valid_time, u.valid_time_end) AS lacks_value
        FROM jsonb_array_elements(updates) WITH ORDINALITY AS i (item, number)
        CROSS JOIN LATERAL jsonb_to_record(i.item) AS u (series_id uuid, run_id uuid, known_time timestamptz,
            valid_time timestamptz, valid_time_end timestamptz, value float8, annotation text, tags text[])
        LEFT JOIN LATERAL (
            SELECT v.*, v."values"[k] AS value
            FROM values_table v, generate_series(width_bucket(u.valid_time - interval '1 microsecond', v.valid_times) + 1,
                                                 width_bucket(u.valid_time, v.valid_times)) AS k  -- those at valid_time
            WHERE v.tenant_id = tenant AND v.series_id = u.series_id AND v.valid_to >= u.valid_time
              AND v.valid_from >= u.valid_time - interval '768 hours' AND v.valid_from <= u.valid_time
              AND v.run_id = coalesce(u.run_id, v.run_id) AND v.known_time = coalesce(u.known_time, v.known_time)
              AND v.valid_time_ends[k] IS NOT DISTINCT FROM u.valid_time_end
            ORDER BY v.known_time DESC, v.run_order DESC, v.version DESC LIMIT 1) AS e ON true
        LEFT JOIN LATERAL (
            SELECT t.* FROM runs_table t
            WHERE t.tenant_id = tenant AND t.known_time = coalesce(u.known_time, t.known_time)
              AND t.run_id = coalesce(e.run_id, u.run_id, (SELECT l.run_id FROM runs_table l WHERE l.tenant_id = tenant
                  AND l.known_time = u.known_time ORDER BY l.run_order DESC LIMIT 1)) LIMIT 1) AS r ON true
        CROSS JOIN LATERAL (
            SELECT CASE WHEN item ? 'value' THEN u.value ELSE e.value END AS value,
                   CASE WHEN item ? 'annotation' THEN nullif(u.annotation, '') ELSE e.annotation END AS annotation,
                   CASE WHEN item ? 'tags' THEN nullif(u.tags, '{}') ELSE e.tags END AS tags) AS n
        ORDER BY u.series_id, r.run_id, u.valid_time, u.valid_time_end, i.number DESC
    ), stored AS (
        INSERT INTO values_table (tenant_id, series_id, run_id, run_order, version, known_time, change_time, changed_by,
                                  annotation, tags, valid_from, valid_to, valid_times, valid_time_ends, "values")
        SELECT tenant, series_id, run_id, run_order, coalesce(old_version, 0) + 1, known_time, now, author,
               annotation, tags, valid_time, valid_time, ARRAY[valid_time], nullif(ARRAY[valid_time_end], '{NULL}'), ARRAY[value]
        FROM next, clock_timestamp() AS now WHERE run_id IS NOT NULL AND (old_version IS NULL OR differs)
        RETURNING series_id, run_id, valid_from, valid_time_ends[1] AS valid_time_end, version, value_id
    ), told AS (
        SELECT n.number, s.value_id, CASE
               WHEN n.run_id IS NULL AND n.names_run THEN '404updates[%s]: no run has this run_id or known_time'
               WHEN n.run_id IS NULL THEN '404updates[%s]: the series has no value at this valid_time and valid_time_end'
               WHEN n.lacks_value THEN '422updates[%s]: value is required, because the run has none at this valid_time' END AS problem,
               json_build_object('run_id', n.run_id, 'tenant_id', tenant, 'valid_time', iso_time(n.valid_time),
                   'series_id', n.series_id, 'value_id', s.value_id, 'version', coalesce(s.version, n.old_version)) AS item
        FROM next n LEFT JOIN stored s ON s.series_id = n.series_id AND s.run_id = n.run_id
             AND s.valid_from = n.valid_time AND s.valid_time_end IS NOT DISTINCT FROM n.valid_time_end
    )
    SELECT json_strip_nulls(json_build_object('refusal', (array_agg(format(problem, number - 1) ORDER BY problem IS NULL, number))[1],
               'updated', coalesce(json_agg(item ORDER BY number) FILTER (WHERE value_id IS NOT NULL), '[]'),
               'skipped_no_ops', coalesce(json_agg(item ORDER BY number) FILTER (WHERE value_id IS NULL), '[]')))
    INTO answer FROM told;
    IF answer ->> 'refusal' IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'TD' || left(answer ->> 'refusal', 3), MESSAGE = substr(answer ->> 'refusal', 4);
    END IF;
END $timedb$;

-- section: users
-- Keys are 256 random bits, so a plain SHA-256 digest of one cannot be searched backwards; the key itself is not stored.
CREATE TABLE IF NOT EXISTS users_table (
    user_id      uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id    uuid        NOT NULL,
    email        text        NOT NULL,
    key_id       text        NOT NULL,
    key_digest   bytea       NOT NULL UNIQUE CHECK (octet_length(key_digest) = 32),
    access       text        NOT NULL DEFAULT 'rw' CHECK (access IN ('rw', 'ro')),
    is_active    boolean     NOT NULL DEFAULT true,
    expires_at   timestamptz,
    last_used_at timestamptz,
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE UNIQUE INDEX IF NOT EXISTS users_by_email ON users_table (tenant_id, lower(email));
-- The key before this one, if it was given a grace. Added here, because tables of an earlier version lack it.
ALTER TABLE users_table ADD COLUMN IF NOT EXISTS previous_digest bytea UNIQUE, ADD COLUMN IF NOT EXISTS previous_ends_at timestamptz;

-- section: citus
-- Spreads the tenants over the nodes, with all rows of one tenant on one node. users_table stays on the coordinator.
DO $timedb$ DECLARE t regclass; BEGIN
    IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus') THEN
        RAISE EXCEPTION 'the extension citus is not installed in this database: run CREATE EXTENSION citus in it, on every node'; END IF;
    FOREACH t IN ARRAY '{runs_table, series_table, values_table}'::regclass[] LOOP
        PERFORM create_distributed_table(t, 'tenant_id') WHERE t NOT IN (SELECT logicalrelid FROM pg_dist_partition WHERE partmethod = 'h');
    END LOOP; END $timedb$;

-- section: upgrade
-- What makes tables of an earlier version, and new ones, those of this version. lz4 takes a fifth of the default's time.
ALTER TABLE values_table ALTER valid_times SET COMPRESSION lz4, ALTER valid_time_ends SET COMPRESSION lz4,
    ALTER "values" SET COMPRESSION lz4;
COMMENT ON TABLE runs_table IS 'timedb schema 2';

-- section: app role
GRANT USAGE ON SCHEMA :schema TO :app_role;
GRANT SELECT, INSERT ON runs_table, series_table, values_table TO :app_role;
GRANT SELECT ON current_values TO :app_role;

-- section: app role with users
GRANT SELECT (user_id, tenant_id, email, key_digest, previous_digest, previous_ends_at, access, is_active, expires_at,
    last_used_at), UPDATE (last_used_at) ON users_table TO :app_role;

-- section: delete
DROP VIEW IF EXISTS current_values;
DROP FUNCTION IF EXISTS correct_values(uuid, text, jsonb), iso_time(timestamptz);
DROP TABLE IF EXISTS values_table, series_table, runs_table, users_table;
