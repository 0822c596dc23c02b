-- The whole database side of timedb. `timedb create tables` runs the sections that it needs in one transaction, with search_path
-- set to the schema that was asked for; `--dry-run` prints what would run on an empty database. Every statement is safe to repeat.
-- :schema and :app_role stand for quoted identifiers from the command line. The API only inserts: a correction is a further row.
-- Users and keys change, and an operator may erase. tenant_id leads every key of data, so that tables can be distributed by it.

-- section: begin
SELECT pg_advisory_xact_lock(hashtextextended('timedb create tables', 0));  -- two at once would race for the same names
SET LOCAL search_path = :schema;
SET LOCAL enable_seqscan = on; SET LOCAL enable_sort = on;  -- an upgrade reads whole tables
SET LOCAL citus.multi_shard_modify_mode = sequential;  -- or Citus refuses functions and views after tables
DO $timedb$ BEGIN CREATE SCHEMA :schema;
EXCEPTION WHEN duplicate_schema OR insufficient_privilege THEN NULL;  -- it is there, or what follows says that it is not
END $timedb$;

-- section: tables
CREATE TABLE IF NOT EXISTS runs_table (  -- one row per upload
    tenant_id       uuid        NOT NULL,
    run_id          uuid        NOT NULL,
    run_order       bigint      NOT NULL GENERATED ALWAYS AS IDENTITY,  -- decides between runs of one known_time
    workflow_id     text        NOT NULL,
    run_start_time  timestamptz NOT NULL,
    run_finish_time timestamptz,
    known_time      timestamptz NOT NULL,
    run_params      json        CHECK (json_typeof(run_params) = 'object'),  -- as it was sent
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
    PRIMARY KEY (tenant_id, series_id), UNIQUE (tenant_id, series_key)
);

-- One row holds consecutive values of one series from one run (a block), or one value, in a column of its own; the view value_blocks
-- shows all rows alike. Version 1 is the upload's, a higher one a correction's. No foreign keys, whose checks cost more than the row:
-- an INSERT takes run and series from their tables, an erasure locks writers out. No primary key either: the two indexes by series
-- make windows plain ranges, whose cost does not grow with the history around them, and are small enough to fill their pages.
CREATE TABLE IF NOT EXISTS values_table (
    tenant_id       uuid          NOT NULL,
    run_id          uuid          NOT NULL,
    series_number   bigint        NOT NULL,  -- of series_table
    value_id        bigint        NOT NULL GENERATED ALWAYS AS IDENTITY,
    run_order       bigint        NOT NULL,  -- copied from the run, as known_time is: reads need no join
    known_time      timestamptz   NOT NULL,
    change_time     timestamptz   NOT NULL,
    valid_from      timestamptz   NOT NULL,
    valid_to        timestamptz,             -- NULL, as both arrays are, in a row of one value
    value           float8,                  -- the value of such a row
    version         integer       NOT NULL CHECK (version >= 1),
    changed_by      text,
    annotation      text,
    tags            text[],
    valid_times     timestamptz[],           -- ascending
    valid_time_ends timestamptz[],           -- NULL when every value is a point
    "values"        float8[],
    old_value       float8,                  -- of a correction: the run's value before it; NULL if it had none
    CHECK (valid_to >= valid_from AND valid_to <= valid_from + interval '768 hours'),
    CHECK (valid_from = valid_times[1] AND valid_to = valid_times[cardinality(valid_times)]),
    CHECK (cardinality("values") BETWEEN 1 AND 1000 AND cardinality(valid_times) = cardinality("values"))
);

CREATE TABLE IF NOT EXISTS withdrawals_table (  -- these runs are not shown from change_time on
    tenant_id   uuid        NOT NULL,
    run_id      uuid        NOT NULL,
    change_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    changed_by  text,
    annotation  text,
    PRIMARY KEY (tenant_id, run_id), FOREIGN KEY (tenant_id, run_id) REFERENCES runs_table
);

CREATE TABLE IF NOT EXISTS audit_table (  -- what administrators did: only the owner of the tables may read and write it
    audit_id  bigint      PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    db_role   text        NOT NULL DEFAULT session_user,
    os_user   text        NOT NULL,  -- as the command said
    action    text        NOT NULL,
    tenant_id uuid,
    email     text,                  -- of whom, if it was about a user
    detail    text        NOT NULL
);

CREATE OR REPLACE FUNCTION iso_time(t timestamptz) RETURNS text STABLE  -- as the API writes times that a clock made: in UTC, with six digits
    RETURN to_char(t AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"');

-- section: users
CREATE TABLE IF NOT EXISTS users_table (
    user_id    uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id  uuid        NOT NULL,
    email      text        NOT NULL,
    is_active  boolean     NOT NULL DEFAULT true,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE UNIQUE INDEX IF NOT EXISTS users_by_email ON users_table (tenant_id, lower(email));
CREATE UNIQUE INDEX IF NOT EXISTS users_by_tenant ON users_table (tenant_id, user_id);

-- Keys are 256 random bits, so a plain SHA-256 digest of one cannot be searched backwards; the key itself is not stored.
CREATE TABLE IF NOT EXISTS keys_table (
    key_id      text        PRIMARY KEY,  -- what may be shown of the key
    tenant_id   uuid        NOT NULL,
    user_id     uuid        NOT NULL,
    name        text        NOT NULL,
    key_digest  bytea       NOT NULL UNIQUE CHECK (octet_length(key_digest) = 32),
    access      text        NOT NULL CHECK (access IN ('rw', 'ro')),
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at  timestamptz,
    revoked_at  timestamptz,              -- NULL: it is not revoked
    has_grace   boolean     NOT NULL DEFAULT false,  -- it works on until revoked_at; else it does not, whatever the clock says
    replaced_by text,                     -- the key that came in its place; NULL if it was revoked by itself
    FOREIGN KEY (tenant_id, user_id) REFERENCES users_table (tenant_id, user_id)
);
CREATE UNIQUE INDEX IF NOT EXISTS keys_by_name ON keys_table (user_id, lower(name)) WHERE revoked_at IS NULL;
CREATE INDEX IF NOT EXISTS keys_by_user ON keys_table (tenant_id, user_id);

CREATE TABLE IF NOT EXISTS key_uses (  -- the API writes it. A foreign key would have it lock rows of keys_table
    key_id       text        PRIMARY KEY,
    last_used_at timestamptz NOT NULL CHECK (last_used_at BETWEEN '2000-01-01' AND '9999-01-01')  -- what every program can read
);

-- Earlier versions held one key, and the one before it in its grace, with the user.
DO $timedb$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'users_table'::regclass AND attname = 'key_digest') THEN RETURN; END IF;
    ALTER TABLE users_table ADD COLUMN IF NOT EXISTS previous_digest bytea, ADD COLUMN IF NOT EXISTS previous_ends_at timestamptz;
    INSERT INTO keys_table (key_id, tenant_id, user_id, name, key_digest, access, created_at, expires_at)
        SELECT key_id, tenant_id, user_id, 'default', key_digest, access, created_at, expires_at FROM users_table;
    INSERT INTO keys_table (key_id, tenant_id, user_id, name, key_digest, access, created_at, expires_at, revoked_at, has_grace, replaced_by)
        SELECT (SELECT string_agg(substr('abcdefghijklmnopqrstuvwxyz234567', 1 + get_byte(b, i) % 32, 1), '')  -- it was not stored
                FROM (SELECT sha256(previous_digest) AS b) AS d, generate_series(0, 7) AS i),
               tenant_id, user_id, 'default', previous_digest, access, created_at, expires_at, previous_ends_at, true, key_id
        FROM users_table WHERE previous_digest IS NOT NULL AND previous_ends_at IS NOT NULL;
    INSERT INTO key_uses SELECT key_id, last_used_at FROM users_table WHERE last_used_at IS NOT NULL;
    ALTER TABLE users_table DROP key_id, DROP key_digest, DROP access, DROP expires_at, DROP last_used_at, DROP previous_digest, DROP previous_ends_at;
END $timedb$;

-- section: citus
-- Spreads the tenants over the nodes, with all rows of one tenant on one node. users_table stays on the coordinator.
DO $timedb$ DECLARE t regclass; BEGIN
    IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus') THEN RAISE EXCEPTION
        'the extension citus is not installed in this database: run CREATE EXTENSION citus in it, on every node'; END IF;
    FOREACH t IN ARRAY '{runs_table, series_table, values_table, withdrawals_table}'::regclass[] LOOP
        CONTINUE WHEN t IN (SELECT logicalrelid FROM pg_dist_partition WHERE partmethod = 'h');
        EXECUTE format('DROP TRIGGER IF EXISTS written_now ON %s', t);  -- Citus takes no triggers
        PERFORM create_distributed_table(t, 'tenant_id');
    END LOOP;
    PERFORM truncate_local_data_after_distributing_table(d) FROM unnest(  -- the rows, which are on the nodes now, leave the coordinator
        '{withdrawals_table, values_table, series_table, runs_table}'::regclass[]) AS d;
END $timedb$;

-- section: upgrade
-- What makes tables of an earlier version, and new ones, those of this version. Earlier ones had series_id in values_table, in its key.
ALTER TABLE series_table ADD COLUMN IF NOT EXISTS series_number bigint NOT NULL  -- 60 bits, which are random, of the id
    GENERATED ALWAYS AS (('x' || right(replace(series_id::text, '-', ''), 15))::bit(60)::bigint) STORED;
ALTER TABLE values_table ADD COLUMN IF NOT EXISTS old_value float8, ADD COLUMN IF NOT EXISTS value float8, DROP CONSTRAINT IF EXISTS value_or_values,
    DROP CONSTRAINT IF EXISTS values_table_tenant_id_run_id_fkey, DROP CONSTRAINT IF EXISTS values_table_tenant_id_series_id_fkey,
    ALTER valid_to DROP NOT NULL, ALTER valid_times DROP NOT NULL, ALTER "values" DROP NOT NULL, REPLICA IDENTITY FULL;
DO $timedb$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'values_table'::regclass AND attname = 'series_id') THEN RETURN; END IF;
    DROP INDEX IF EXISTS corrections_by_version; ALTER TABLE values_table DROP CONSTRAINT values_table_pkey, ADD COLUMN series_number bigint;
    IF to_regclass('pg_dist_partition') IS NULL THEN  -- Citus 13.2 crashes at it
        UPDATE values_table SET value = "values"[1], valid_to = NULL, valid_times = NULL, "values" = NULL WHERE cardinality("values") = 1; END IF;
    ALTER TABLE values_table ALTER series_number TYPE bigint USING ('x' || right(replace(series_id::text, '-', ''), 15))::bit(60)::bigint;
    ALTER TABLE values_table ALTER series_number SET NOT NULL;
END $timedb$;
CREATE UNIQUE INDEX IF NOT EXISTS series_by_number ON series_table (tenant_id, series_number);
CREATE INDEX IF NOT EXISTS values_by_series ON values_table (series_number, valid_from) WHERE valid_to IS NULL;
CREATE INDEX IF NOT EXISTS blocks_by_series ON values_table (series_number, valid_from) WHERE valid_to IS NOT NULL;
ALTER TABLE values_table ADD CONSTRAINT value_or_values CHECK (num_nulls(valid_to, valid_times, "values") IN (0, 3)
    AND (value IS NULL OR "values" IS NULL) AND cardinality(valid_time_ends) = coalesce(cardinality("values"), 1));
CREATE INDEX IF NOT EXISTS corrections_by_change_time ON values_table (tenant_id, change_time) WHERE version > 1;
DO $timedb$ BEGIN  -- lz4 takes a fifth of the default's time
    ALTER TABLE values_table ALTER valid_times SET COMPRESSION lz4, ALTER valid_time_ends SET COMPRESSION lz4, ALTER "values" SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
    RAISE WARNING 'this PostgreSQL was built without lz4: values take its own compression, which is slower';
END $timedb$;
-- run_params were jsonb, which writes numbers out: 1e131071 as 131,072 digits. What became too long so is not kept.
DO $timedb$ DECLARE r record; BEGIN
    IF (SELECT atttypid <> 'jsonb'::regtype FROM pg_attribute WHERE attrelid = 'runs_table'::regclass AND attname = 'run_params') THEN RETURN; END IF;
    FOR r IN SELECT tenant_id, run_id, octet_length(run_params::text) AS bytes FROM runs_table WHERE octet_length(run_params::text) > 65536 LOOP
        RAISE WARNING 'run_params of run % of tenant % are % bytes long and were not kept', r.run_id, r.tenant_id, r.bytes;
    END LOOP;
    ALTER TABLE runs_table DROP CONSTRAINT runs_table_run_params_check;
    ALTER TABLE runs_table ALTER run_params TYPE json USING CASE WHEN octet_length(run_params::text) <= 65536 THEN run_params::text::json END;
    ALTER TABLE runs_table ADD CHECK (json_typeof(run_params) = 'object');
END $timedb$;
DROP FUNCTION IF EXISTS correct_values(uuid, text, jsonb);
-- Corrections count from 2 on, as they were written. Gained values had version 1, and after a failure of Citus two may have had one.
UPDATE values_table v SET version = n.version, old_value = NULL
FROM (SELECT tenant_id, value_id, 1 + row_number() OVER (
          PARTITION BY tenant_id, series_number, run_id, valid_from, valid_time_ends[1] ORDER BY version, change_time, value_id) AS version
      FROM values_table JOIN runs_table USING (tenant_id, run_id) WHERE version > 1 OR change_time > inserted_at) AS n
WHERE (v.tenant_id, v.value_id) = (n.tenant_id, n.value_id) AND v.version <> n.version;
CREATE UNIQUE INDEX IF NOT EXISTS corrections_by_version ON values_table
    (tenant_id, series_number, run_id, valid_from, coalesce(valid_time_ends[1], 'infinity'), version) WHERE version > 1;
-- Not even the role that inserts may write into the past: a read as of a moment repeats. Citus takes no triggers.
CREATE OR REPLACE FUNCTION refuse_past() RETURNS trigger LANGUAGE plpgsql AS $timedb$ BEGIN
    RAISE EXCEPTION 'a row of % must bear the time of the transaction that writes it, of at most 10 minutes', TG_TABLE_NAME;
END $timedb$;
DO $timedb$ DECLARE t text; BEGIN
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'citus') THEN
        RAISE WARNING 'with the extension citus there are no triggers that refuse rows written into the past'; RETURN; END IF;
    FOREACH t IN ARRAY '{runs_table, series_table, values_table, withdrawals_table}'::text[] LOOP
        EXECUTE format($trigger$ CREATE OR REPLACE TRIGGER written_now BEFORE INSERT ON %I FOR EACH ROW
            WHEN (NEW.%I < transaction_timestamp() - interval '5 seconds' OR NEW.%2$I > clock_timestamp() + interval '5 seconds'
                  OR transaction_timestamp() < clock_timestamp() - interval '10 minutes')
            EXECUTE FUNCTION refuse_past()$trigger$, t, CASE WHEN t IN ('runs_table', 'series_table') THEN 'inserted_at' ELSE 'change_time' END);
    END LOOP;
END $timedb$;
COMMENT ON TABLE runs_table IS 'timedb schema 5';

-- section: views
CREATE OR REPLACE VIEW value_blocks AS  -- the rows of values_table, those of one value with arrays of one
SELECT tenant_id, s.series_id, v.run_id, v.value_id, v.run_order, v.version, v.known_time, v.change_time, v.changed_by, v.annotation, v.tags,
       v.valid_from, v.valid_from AS valid_to, ARRAY[v.valid_from] AS valid_times, v.valid_time_ends, ARRAY[v.value] AS "values", v.old_value,
       series_number
FROM values_table v JOIN series_table s USING (tenant_id, series_number) WHERE v.valid_to IS NULL
UNION ALL
SELECT tenant_id, s.series_id, v.run_id, v.value_id, v.run_order, v.version, v.known_time, v.change_time, v.changed_by, v.annotation, v.tags,
       v.valid_from, v.valid_to, v.valid_times, v.valid_time_ends, v."values", v.old_value, series_number
FROM values_table v JOIN series_table s USING (tenant_id, series_number) WHERE v.valid_to IS NOT NULL;
CREATE OR REPLACE VIEW current_values AS  -- what a flat read shows, one row per value, for SQL tools
SELECT DISTINCT ON (v.tenant_id, v.series_id, e.valid_time, e.valid_time_end)
       v.tenant_id, v.series_id, s.series_key, s.unit, e.valid_time, e.valid_time_end, v.known_time, e.value, v.annotation, v.tags,
       v.changed_by, v.change_time, v.run_id, v.version
FROM value_blocks v JOIN series_table s USING (tenant_id, series_id)
CROSS JOIN LATERAL unnest(v.valid_times, v.valid_time_ends, v."values") AS e (valid_time, valid_time_end, value)
WHERE NOT EXISTS (SELECT FROM withdrawals_table w WHERE w.tenant_id = v.tenant_id AND w.run_id = v.run_id)
ORDER BY v.tenant_id, v.series_id, e.valid_time, e.valid_time_end, v.known_time DESC, v.run_order DESC, v.version DESC;

-- section: upgrade of columns
ALTER TABLE values_table DROP COLUMN IF EXISTS series_id;
UPDATE values_table c SET old_value = (
    SELECT e.value FROM value_blocks v CROSS JOIN LATERAL unnest(v.valid_times, v.valid_time_ends, v."values") AS e (valid_time, valid_time_end, value)
    WHERE v.tenant_id = c.tenant_id AND v.series_number = c.series_number AND v.run_id = c.run_id AND v.version < c.version
      AND v.valid_from BETWEEN c.valid_from - interval '768 hours' AND c.valid_from AND v.valid_to >= c.valid_from
      AND e.valid_time = c.valid_from AND e.valid_time_end IS NOT DISTINCT FROM c.valid_time_ends[1] ORDER BY v.version DESC LIMIT 1)
WHERE c.version > 1 AND c.old_value IS NULL;
ANALYZE series_table, values_table;

-- section: app role
GRANT USAGE ON SCHEMA :schema TO :app_role;
GRANT SELECT, INSERT ON runs_table, series_table, values_table, withdrawals_table TO :app_role;
GRANT SELECT ON value_blocks, current_values TO :app_role;
GRANT USAGE ON SEQUENCE values_table_value_id_seq TO :app_role;

-- section: app role with users
GRANT SELECT ON users_table, keys_table TO :app_role;
GRANT SELECT, INSERT, UPDATE (last_used_at) ON key_uses TO :app_role;  -- UPDATE of the whole could lock it

-- section: delete
DROP VIEW IF EXISTS current_values, value_blocks;
DROP TABLE IF EXISTS values_table, withdrawals_table, series_table, runs_table, key_uses, keys_table, users_table, audit_table;
DROP FUNCTION IF EXISTS correct_values(uuid, text, jsonb), iso_time(timestamptz), refuse_past();
