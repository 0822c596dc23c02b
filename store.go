package main

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	_ "embed"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/lib/pq"
)

//go:embed schema.sql
var schemaSQL string

const (
	// A block is one row of values_table; schema.sql checks both bounds. 1,000 values make a row's overhead (some 200
	// bytes) vanish beside them; 32 days bound how far before a window the read of that window must start.
	maxBlockValues     = 1000
	maxBlockSpan       = micros(32 * 24 * time.Hour / time.Microsecond)
	blocksPerStatement = 250              // so that the parameters of one INSERT stay within some megabytes
	poolSize           = 24               // keeps a dozen cores busy; two servers, with lookupPool, fit PostgreSQL's default of 100
	lookupPool         = 8                // connections for looking up keys alone
	connMaxLifetime    = 30 * time.Minute // retires a connection that went bad
	schemaVersion      = 2                // of the tables that this program knows; schema.sql writes it down
	statementTimeout   = 5 * time.Minute  // PostgreSQL ends a statement of the API then, whatever became of its server
)

// store is all of timedb's SQL. A method that touches tenant data takes the Caller first after ctx and binds its tenant.
type store struct {
	db         *sql.DB
	schema     string
	exposed    bool     // who sits between here and the database could listen in
	statements sync.Map // of *sql.Stmt by query
}

var errBadDSN = errors.New("the DSN cannot be read: expected postgresql://user:password@host:port/database (percent-encode " +
	"reserved characters of the password) or key=value pairs")

// openStore prepares a pool of connections that see schema alone; it does not connect yet. timeout ends a statement on
// the database's side; 0 means never. connections is the most that there will be. An error never holds any part of the
// DSN, as lib/pq's would.
func openStore(dsn, schema string, timeout time.Duration, connections int) (*store, error) {
	if os.Getenv("PGSERVICE") != "" {
		return nil, errors.New("PGSERVICE is set and would override the DSN: unset it")
	}
	cfg, err := pq.NewConfig(dsn)
	if err != nil || strings.ContainsAny(cfg.Database, "@/?#") || strings.ContainsAny(cfg.Host, "@?#") {
		return nil, errBadDSN // a reserved character in the password has shifted what follows it
	}
	cfg.SSLMode = cmp.Or(cfg.SSLMode, pq.SSLModePrefer) // as libpq does; lib/pq would require TLS
	cfg.ConnectTimeout = cmp.Or(cfg.ConnectTimeout, lookupTimeout)
	cfg.ApplicationName = cmp.Or(cfg.ApplicationName, "timedb")
	cfg.BinaryParameters = true
	cfg.TZ = "UTC"
	cfg = cfg.Clone()                                                                             // with room for parameters
	cfg.Runtime["search_path"] = pq.QuoteIdentifier(schema) + ", pg_temp"                         // last, or temporary tables hide ours
	cfg.Runtime["plan_cache_mode"] = cmp.Or(cfg.Runtime["plan_cache_mode"], "force_generic_plan") // Citus: auto
	cfg.Runtime["statement_timeout"] = fmt.Sprint(timeout.Milliseconds())
	cfg.Runtime["idle_in_transaction_session_timeout"] = "60000" // a vanished client must not keep its locks
	connector, err := pq.NewConnectorConfig(cfg)
	if err != nil {
		return nil, errBadDSN
	}
	if timeout > 0 {
		connector.Dialer(&boundedConn{timeout: timeout + time.Second}) // later than PostgreSQL would say so itself
	}
	db := sql.OpenDB(connector)
	db.SetMaxOpenConns(connections)
	db.SetMaxIdleConns(connections)
	db.SetConnMaxLifetime(connMaxLifetime)
	near := (isLoopback(cfg.Host) || strings.HasPrefix(cfg.Host, "/")) && len(cfg.Multi) == 0 && !cfg.Hostaddr.IsValid() // "/": a socket
	return &store{db: db, schema: schema, exposed: !near && cfg.SSLMode != pq.SSLModeVerifyFull}, nil
}

// boundedConn is a connection to a database that may freeze: what is sent is taken and answered within timeout, or it fails.
// Before it has a net.Conn, it is the dialer that makes one.
type boundedConn struct {
	pq.Dialer // nil: with a DialContext lib/pq calls no other method
	net.Conn
	timeout    time.Duration
	connecting bool // lib/pq has set a deadline of its own, for connecting
}

func (c *boundedConn) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	return &boundedConn{Conn: conn, timeout: c.timeout}, err
}

func (c *boundedConn) SetDeadline(t time.Time) error {
	c.connecting = !t.IsZero()
	return c.Conn.SetDeadline(t)
}

func (c *boundedConn) Write(p []byte) (int, error) {
	if !c.connecting {
		_ = c.Conn.SetDeadline(time.Now().Add(c.timeout)) // it fails on a closed connection only, and then so does Write
	}
	return c.Conn.Write(p)
}

// QueryContext prepares query once per connection: that saves planning it, and only so does lib/pq receive bytea in binary.
func (s *store) QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error) {
	st, known := s.statements.Load(query)
	if !known {
		prepared, err := s.db.PrepareContext(ctx, query)
		if err != nil {
			return nil, err
		}
		st, _ = s.statements.LoadOrStore(query, prepared)
	}
	return st.(*sql.Stmt).QueryContext(ctx, args...)
}

// scanAll reads every row into a T, whose fields' addresses are what fields returns, and closes rows.
func scanAll[T any](rows *sql.Rows, err error, fields func(*T) []any) ([]T, error) {
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	all := []T{}
	for rows.Next() {
		var one T
		if err := rows.Scan(fields(&one)...); err != nil {
			return nil, err
		}
		all = append(all, one)
	}
	return all, rows.Err()
}

// inTx runs fn in one transaction and commits when fn returns nil. Otherwise, or when fn panics, nothing is stored. An
// error of the commit itself leaves open whether it took effect: that is what a client's own run_id is for. Whatever writes
// does it here: outside a transaction database/sql may run a statement again whose answer was lost.
func (s *store) inTx(ctx context.Context, fn func(*sql.Tx) error) error {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // after the commit it does nothing
	if err := fn(tx); err != nil {
		return err
	}
	return tx.Commit()
}

// exec runs query in a transaction of its own; without args it may hold several statements.
func (s *store) exec(ctx context.Context, query string, args ...any) error {
	return s.inTx(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, query, args...)
		return err
	})
}

// asJSON is v, which json.Marshal can marshal: also as a bound argument that SQL unpacks.
func asJSON(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // a bug
	}
	return string(text)
}

// sqlState returns the five-character code of a PostgreSQL error, "" for any other error.
func sqlState(err error) string {
	return string(cmp.Or(pq.As(err), new(pq.Error)).Code)
}

// unavailable: the database cannot serve now; not a bug of timedb's. https://www.postgresql.org/docs/15/errcodes-appendix.html
func unavailable(err error) bool {
	var netErr net.Error
	return errors.As(err, &netErr) || slices.ContainsFunc([]error{context.Canceled, context.DeadlineExceeded, driver.ErrBadConn, io.EOF,
		io.ErrUnexpectedEOF, sql.ErrConnDone, sql.ErrTxDone}, func(e error) bool { return errors.Is(err, e) }) ||
		// Classes: connection, authorization, rollback (deadlock), resources, operator intervention, system. Codes: no table or
		// function, no privilege, read-only standby, no database, not open to connections, object in use, plan of an older schema.
		slices.ContainsFunc([]string{"08", "28", "40", "53", "57", "58", "42P01", "42883", "42501", "25006", "3D000", "55000", "55006", "0A000"},
			func(start string) bool { return strings.HasPrefix(sqlState(err), start) })
}

// schemaSections returns the sections of schema.sql that are wanted, with the placeholders replaced by quoted identifiers.
func schemaSections(schema, role string, wanted map[string]bool) string {
	text := ""
	for _, section := range strings.Split(schemaSQL, "-- section: ")[1:] {
		if name, body, _ := strings.Cut(section, "\n"); wanted[name] {
			text += "\n" + strings.TrimSpace(body) + "\n"
		}
	}
	return strings.NewReplacer(":schema", pq.QuoteIdentifier(schema), ":app_role", pq.QuoteIdentifier(role)).Replace(text)
}

// catalog is what there is of timedb in the store's schema. It is read from PostgreSQL's catalog, which does not hide what this
// role may not use: a name that is not among names is proven absent.
type catalog struct {
	names    pq.StringArray // of tables and views
	version  int            // of the tables; 1 if they do not tell, 0 if there are none
	rewrites bool           // the role could change or delete stored data
}

func (s *store) catalog(ctx context.Context) (c catalog, err error) {
	rows, err := s.QueryContext(ctx, `
		SELECT array_agg(c.relname::text ORDER BY c.relname), coalesce(max(CASE c.relname WHEN 'runs_table'
		       THEN coalesce(substring(obj_description(c.oid, 'pg_class') FROM 'timedb schema (\d+)')::integer, 1) END), 0),
		       coalesce(bool_or(has_table_privilege(c.oid, 'DELETE, TRUNCATE')
		       OR CASE c.relname WHEN 'users_table' THEN has_table_privilege(c.oid, 'INSERT, UPDATE')
		                         ELSE has_any_column_privilege(c.oid, 'UPDATE') END)
		       FILTER (WHERE c.relname LIKE '%table'), false)
		FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1
		AND c.relname IN ('runs_table', 'series_table', 'values_table', 'current_values', 'users_table')`, s.schema)
	_, err = scanAll(rows, err, func(*struct{}) []any { return []any{&c.names, &c.version, &c.rewrites} }) // it is one row
	return c, err
}

// check returns an error unless the tables, if there are any, are of this program's version.
func (c catalog) check() error {
	return invalidIf(c.version != 0 && c.version != schemaVersion, "the tables are of schema version %d and this timedb is for %d: "+
		"run timedb create tables if they are older, or else the timedb that made them", c.version, schemaVersion)
}

// usersTableExists: true is present, false is proven absent, an error is neither.
func (s *store) usersTableExists(ctx context.Context) (bool, error) {
	c, err := s.catalog(ctx)
	return slices.Contains(c.names, "users_table"), err
}

// user is a row of users_table as an operator may see it: without digests.
type user struct {
	ID        string     `json:"user_id"`
	Tenant    string     `json:"tenant_id"`
	Email     string     `json:"email"`
	KeyID     string     `json:"key_id"`
	Access    string     `json:"access"`
	Active    bool       `json:"is_active"`
	Status    string     `json:"status"` // active, inactive or expired
	ExpiresAt *time.Time `json:"expires_at"`
	LastUsed  *time.Time `json:"last_used_at"`
	CreatedAt time.Time  `json:"created_at"`
}

// LookupKey finds the user whose key has this digest, in whatever state: auth.go judges.
func (s *store) LookupKey(ctx context.Context, digest []byte) (keyRecord, error) {
	rows, err := s.QueryContext(ctx, `
		SELECT user_id, tenant_id, email, access = 'ro', is_active, CASE key_digest WHEN $1 THEN key_digest ELSE previous_digest END,
		       coalesce(least(expires_at, CASE WHEN key_digest <> $1 THEN previous_ends_at END) <= clock_timestamp(), key_digest <> $1),
		       coalesce(last_used_at < clock_timestamp() - interval '5 minutes', true)
		FROM users_table WHERE key_digest = $1 OR previous_digest = $1`, digest)
	found, err := scanAll(rows, err, func(k *keyRecord) []any {
		return []any{&k.userID, &k.tenant, &k.email, &k.readOnly, &k.active, &k.digest, &k.expired, &k.useIsStale}
	})
	return append(found, keyRecord{})[0], err
}

// TouchKey notes that a user's key was used now.
func (s *store) TouchKey(ctx context.Context, userID string) error {
	return s.exec(ctx, `UPDATE users_table SET last_used_at = clock_timestamp() WHERE user_id = $1`, userID)
}

// CreateUser stores u with its key's digest and sets u.ID and u.ExpiresAt. An email is unique in its tenant.
func (s *store) CreateUser(ctx context.Context, u *user, digest []byte, ends expiry) error {
	err := s.inTx(ctx, func(tx *sql.Tx) error {
		return tx.QueryRowContext(ctx, `
			INSERT INTO users_table (tenant_id, email, key_id, key_digest, access, expires_at) VALUES ($1, $2, $3, $4, $5, $6)
			RETURNING user_id, expires_at`, u.Tenant, u.Email, u.KeyID, digest, u.Access, micros(ends)).Scan(&u.ID, &u.ExpiresAt)
	})
	if sqlState(err) == "23505" {
		//lint:ignore ST1005 the contract quotes this sentence
		return fmt.Errorf("User with email '%s' already exists for this tenant.", u.Email)
	}
	return err
}

// Users lists users by tenant and email. An empty tenant or email means all.
func (s *store) Users(ctx context.Context, tenant, email string) ([]user, error) {
	rows, err := s.QueryContext(ctx, `
		SELECT user_id, tenant_id, email, key_id, access, is_active,
		       CASE WHEN NOT is_active THEN 'inactive' WHEN expires_at <= clock_timestamp() THEN 'expired' ELSE 'active' END,
		       expires_at, last_used_at, created_at
		FROM users_table WHERE ($1 = '' OR tenant_id = nullif($1, '')::uuid) AND ($2 = '' OR lower(email) = lower($2))
		ORDER BY tenant_id, lower(email)`, tenant, email)
	return scanAll(rows, err, func(u *user) []any {
		return []any{&u.ID, &u.Tenant, &u.Email, &u.KeyID, &u.Access, &u.Active, &u.Status, &u.ExpiresAt, &u.LastUsed, &u.CreatedAt}
	})
}

// SetActive deactivates or activates a user; from its return on every server sees it. What was in its grace then has ended.
func (s *store) SetActive(ctx context.Context, userID string, active bool) error {
	return s.exec(ctx, `
		UPDATE users_table SET is_active = $2, previous_digest = CASE WHEN $2 THEN previous_digest END
		WHERE user_id = $1`, userID, active)
}

// ReplaceKey gives u a new key. The old one, unless it is dead already, ends after grace; if that is 0, now. ends 0: as before.
func (s *store) ReplaceKey(ctx context.Context, u *user, keyID string, digest []byte, grace span, ends expiry) error {
	return s.inTx(ctx, func(tx *sql.Tx) error {
		return tx.QueryRowContext(ctx, `
			UPDATE users_table SET key_id = $2, key_digest = $3, previous_ends_at = clock_timestamp() + $4::bigint * interval '1 microsecond',
			       previous_digest = CASE WHEN $4::bigint > 0 AND is_active AND coalesce(expires_at > clock_timestamp(), true)
			                         THEN key_digest END, expires_at = coalesce($5::timestamptz, expires_at)
			WHERE user_id = $1 RETURNING expires_at`, u.ID, keyID, digest, int64(grace), micros(ends)).Scan(&u.ExpiresAt)
	})
}

type series struct{ ID, Key, Unit string }

// seriesRef names a series by id, by key, or by both.
type seriesRef struct {
	ID  uuid  `json:"id"`
	Key label `json:"key"`
}

func noSeries(ref seriesRef) error {
	field := map[bool]string{true: "series_id", false: "series_key"}[ref.ID != ""]
	return refusal(404, "%s: there is no series %q", field, cmp.Or(string(ref.ID), string(ref.Key)))
}

// findSeries returns the series that each ref names, of the caller's tenant. One that does not exist is a 404, an
// id with another key than the one given a 422.
func findSeries(ctx context.Context, c Caller, tx *sql.Tx, refs []seriesRef) ([]series, error) {
	rows, err := tx.QueryContext(ctx, `
		SELECT coalesce(s.series_id::text, ''), coalesce(s.series_key, ''), coalesce(s.unit, '')
		FROM ROWS FROM (json_to_recordset($2) AS (id text, key text)) WITH ORDINALITY AS ref (id, key, number)
		LEFT JOIN LATERAL (
			SELECT * FROM series_table WHERE tenant_id = $1 AND series_id = nullif(ref.id, '')::uuid
			UNION ALL
			SELECT * FROM series_table WHERE tenant_id = $1 AND series_key = ref.key AND ref.id = ''
		) AS s ON true ORDER BY ref.number`, c.tenant, asJSON(refs))
	found, err := scanAll(rows, err, func(x *series) []any { return []any{&x.ID, &x.Key, &x.Unit} })
	for i, x := range found {
		ref := refs[i]
		if x.ID == "" {
			return nil, noSeries(ref)
		}
		if ref.Key != "" && string(ref.Key) != x.Key {
			return nil, invalid("series_id: %s is not the series %q", ref.ID, ref.Key)
		}
	}
	return found, err
}

// ensureSeries returns the series that each ref names, after creating those named by a key that is new, and how many it
// created. They are inserted in one order whoever inserts, so that two uploads of the same series cannot deadlock.
func ensureSeries(ctx context.Context, c Caller, tx *sql.Tx, refs []seriesRef, unit label, about map[label]prose) (
	found []series, created int, err error) {
	rows, err := tx.QueryContext(ctx, `
		INSERT INTO series_table (tenant_id, series_key, unit, description)
		SELECT $1::uuid, n.key, $2, nullif($4::jsonb ->> n.key, '') FROM json_to_recordset($3) AS n (id text, key text)
		WHERE n.id = '' AND (SELECT series_id FROM series_table t WHERE t.tenant_id = $1 AND t.series_key = n.key) IS NULL
		ORDER BY n.key COLLATE "C" ON CONFLICT (tenant_id, series_key) DO NOTHING RETURNING true`,
		c.tenant, unit, asJSON(refs), asJSON(about))
	isNew, err := scanAll(rows, err, func(new *bool) []any { return []any{new} }) // counted: Citus's own count has conflicts in it
	if err == nil {
		found, err = findSeries(ctx, c, tx, refs)
	}
	return found, len(isNew), err
}

// CreateSeries makes a series or finds the one of that key. created tells which; another unit is a 409.
func (s *store) CreateSeries(ctx context.Context, c Caller, key, unit label, description prose) (id string, created bool, err error) {
	err = s.inTx(ctx, func(tx *sql.Tx) error {
		found, n, err := ensureSeries(ctx, c, tx, []seriesRef{{Key: key}}, unit, map[label]prose{key: description})
		if err != nil {
			return err
		}
		if found[0].Unit != string(unit) {
			return refusal(409, "unit: the series %q exists with the unit %q", key, found[0].Unit)
		}
		id, created = found[0].ID, n == 1
		return nil
	})
	return id, created, err
}

// point is one value at its time. A NULL value is NaN: no NaN is ever stored.
type point struct {
	time, end micros
	value     float64
}

func comparePoints(a, b point) int {
	return cmp.Or(cmp.Compare(a.time, b.time), cmp.Compare(a.end, b.end))
}

// upload is one run with its values.
type upload struct {
	runID                uuid
	workflowID           label
	start, finish, known micros           // the latter two may be 0
	params               *json.RawMessage // an object, or nil
	descriptions         map[label]prose
	points               map[seriesRef][]point // of each series, as the rows named it
	row                  uploadRow             // the one that is being decoded
	rows                 int
	digest               [32]byte // of the request, to tell a retry from a clash
}

// Upload stores a run and its values, all or nothing, and returns the ids of its series by key. The same run_id with the
// same digest answers as the first time and stores nothing; with another digest it is a 409.
func (s *store) Upload(ctx context.Context, c Caller, u *upload) (map[string]string, error) {
	ids := map[string]string{}
	err := s.inTx(ctx, func(tx *sql.Tx) error {
		// The series first: as of the run's change_time they must exist.
		refs := slices.AppendSeq([]seriesRef{}, maps.Keys(u.points))
		found, _, err := ensureSeries(ctx, c, tx, refs, defaultUnit, u.descriptions)
		if err != nil {
			return err
		}
		points := map[string][]point{}
		for i, x := range found {
			ids[x.Key] = x.ID
			points[x.ID] = append(points[x.ID], u.points[refs[i]]...) // two refs may name one series
		}
		isNew, err := insertRun(ctx, c, tx, u)
		if err != nil || !isNew {
			return err
		}
		blocks, err := cutBlocks(points)
		for batch := range slices.Chunk(blocks, blocksPerStatement) {
			if err == nil {
				err = insertBlocks(ctx, c, tx, u.runID, batch)
			}
		}
		return err
	})
	return ids, err
}

// insertRun stores the run's own row and sets u.runID if the client did not. isNew: this request was not stored before.
func insertRun(ctx context.Context, c Caller, tx *sql.Tx, u *upload) (isNew bool, err error) {
	err = tx.QueryRowContext(ctx, `
		INSERT INTO runs_table (tenant_id, run_id, workflow_id, run_start_time, run_finish_time, known_time, run_params,
		                        rows_inserted, request_digest, changed_by, inserted_at)
		SELECT $1::uuid, coalesce(nullif($2, '')::uuid, gen_random_uuid()), $3, $4::timestamptz, $5::timestamptz,
		       coalesce($6::timestamptz, now), nullif($7, 'null')::jsonb, $8::integer, $9::bytea, nullif($10, ''), now
		FROM clock_timestamp() AS now
		ON CONFLICT (tenant_id, run_id) DO NOTHING RETURNING run_id`,
		c.tenant, u.runID, u.workflowID, u.start, u.finish, u.known, asJSON(u.params), u.rows, u.digest[:], c.email).Scan(&u.runID)
	if state := sqlState(err); strings.HasPrefix(state, "22") || state == "54001" {
		// Every other argument was checked: only run_params can hold what jsonb refuses (\u0000, numbers out of range).
		return false, invalid("run_params holds something that PostgreSQL cannot store as jsonb")
	}
	if !errors.Is(err, sql.ErrNoRows) {
		return true, err
	}
	err = tx.QueryRowContext(ctx, `SELECT run_id FROM runs_table WHERE tenant_id = $1 AND run_id = $2 AND request_digest = $3`,
		c.tenant, u.runID, u.digest[:]).Scan(&u.runID)
	if errors.Is(err, sql.ErrNoRows) {
		err = refusal(409, "run_id %s was already used for a different request", u.runID)
	}
	return false, err
}

// block is what one row of values_table holds: points of one series in order.
type block struct {
	seriesID string
	points   []point
}

// cutBlocks sorts the points of each series and cuts them into blocks. A point that occurs twice is a 422.
func cutBlocks(bySeries map[string][]point) ([]block, error) {
	var blocks []block
	for id, points := range bySeries {
		slices.SortFunc(points, comparePoints) // quick on what is in order
		begin := 0
		for i, p := range points {
			if i > 0 && comparePoints(points[i-1], p) == 0 {
				return nil, invalid("value_rows: the valid_time %s occurs twice for one series", p.time)
			}
			if i-begin == maxBlockValues || p.time-points[begin].time > maxBlockSpan {
				blocks = append(blocks, block{id, points[begin:i]})
				begin = i
			}
		}
		blocks = append(blocks, block{id, points[begin:]})
	}
	return blocks, nil
}

// insertBlocks stores blocks in one statement: all values end to end in three arrays, and a list of which stretch is whose.
func insertBlocks(ctx context.Context, c Caller, tx *sql.Tx, runID uuid, blocks []block) error {
	var stretches []map[string]any // by positions in the arrays, from 1
	var times, ends, values []uint64
	for _, b := range blocks {
		stretches = append(stretches, map[string]any{"series_id": b.seriesID, "first": len(times) + 1, "last": len(times) + len(b.points)})
		for _, p := range b.points {
			times = append(times, uint64(p.time-pgEpoch)) // #nosec G115 -- bits of a signed number
			ends = append(ends, uint64(p.end-pgEpoch))    // #nosec G115 -- the same
			values = append(values, math.Float64bits(p.value))
		}
	}
	wireEnds := encodeArray(oidTimestamptz, ends, nullTime)
	if len(wireEnds) == arrayHeader+4*len(ends) {
		wireEnds = nil // all are points
	}
	_, err := tx.ExecContext(ctx, `
		INSERT INTO values_table (tenant_id, series_id, run_id, run_order, version, known_time, change_time, changed_by,
		                          valid_from, valid_to, valid_times, valid_time_ends, "values")
		SELECT r.tenant_id, b.series_id, r.run_id, r.run_order, 1, r.known_time, r.inserted_at, r.changed_by,
		       a.times[b.first], a.times[b.last], a.times[b.first:b.last],
		       CASE WHEN num_nonnulls(VARIADIC a.ends[b.first:b.last]) > 0 THEN a.ends[b.first:b.last] END, a."values"[b.first:b.last]
		FROM runs_table r, (SELECT $3::timestamptz[], $4::timestamptz[], $5::float8[]) AS a (times, ends, "values"),
		     json_to_recordset($6) AS b (series_id uuid, first integer, last integer)
		WHERE r.tenant_id = $1 AND r.run_id = $2`, c.tenant, runID, encodeArray(oidTimestamptz, times, nullTime), wireEnds,
		encodeArray(oidFloat8, values, nullFloat), asJSON(stretches))
	return err
}

// ---- arrays in PostgreSQL's binary form (array_send in src/backend/utils/adt/arrayfuncs.c): number of dimensions, whether
// there may be NULLs, the element type's oid, the length, the lower bound, then per element its byte length, -1 for
// NULL, and its bytes; all big-endian. Here every element is 8 bytes: a timestamptz or a float8, as its bits.

const (
	oidTimestamptz = 1184
	oidFloat8      = 701
	arrayHeader    = 20
	nullTime       = 1<<64 - 63_082_281_600e6 // the bits of no time, less pgEpoch
	nullFloat      = 0x7ff8000000000001       // the bits of math.NaN()
)

// encodeArray returns bits as an array of the element type oid; elements equal to null are sent as NULL.
func encodeArray(oid uint32, bits []uint64, null uint64) []byte {
	wire := make([]byte, 0, arrayHeader+12*len(bits))
	wire, _ = binary.Append(wire, binary.BigEndian, []uint32{1, 1, oid, uint32(len(bits)), 1}) // #nosec G115 -- at most maxBody
	for _, b := range bits {
		if b == null {
			wire = binary.BigEndian.AppendUint32(wire, math.MaxUint32)
			continue
		}
		wire = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(wire, 8), b)
	}
	return wire
}

// decodeArray appends the elements of a one-dimensional array to dst, null in place of NULL.
func decodeArray(dst []uint64, wire []byte, null uint64) ([]uint64, error) {
	wire = wire[min(len(wire), arrayHeader):] // an empty array has no dimension and a shorter header
	for len(wire) > 0 {
		switch {
		case len(wire) >= 12 && binary.BigEndian.Uint32(wire) == 8:
			dst = append(dst, binary.BigEndian.Uint64(wire[4:]))
			wire = wire[12:]
		case len(wire) >= 4 && binary.BigEndian.Uint32(wire) == math.MaxUint32:
			dst = append(dst, null)
			wire = wire[4:]
		default:
			return nil, errors.New("array: expected elements of 8 bytes")
		}
	}
	return dst, nil
}

// readQuery says which values to read.
type readQuery struct {
	series               []seriesRef // nil: all
	start, end           micros      // start <= valid_time < end
	startKnown, endKnown micros      // likewise known_time
	asOf                 micros      // only versions written up to then
	lead                 span        // only elements of which known_time is at least so long before valid_time
	bucket               span        // the width of the buckets to aggregate over; 0: none
	agg                  label       // mean, min, max, sum or count
	overlapping          bool        // every run, rather than the latest known
	allVersions          bool        // every version, rather than the current
}

var anyValue = readQuery{start: firstTime, end: lastTime, startKnown: firstTime, endKnown: lastTime, asOf: lastTime, lead: math.MinInt64}

// add returns one more series, to be named.
func (q *readQuery) add() *seriesRef {
	q.series = append(q.series, seriesRef{})
	return &q.series[len(q.series)-1]
}

// version is what all elements of one row of values_table share.
type version struct {
	of                    *series // the same pointer in all rows of a series that follow each other
	first                 micros  // the first valid_time of the row
	RunID                 string
	Order                 int64
	Number                int
	Known, Change         micros
	ChangedBy, Annotation *string
	Tags                  pq.StringArray
}

// supersedes is the rule of the house: of two elements with the same series, valid_time and valid_time_end the later
// known counts; of runs known at the same time the one inserted later; of one run the higher version.
func (v *version) supersedes(w *version) bool {
	return cmp.Or(cmp.Compare(v.Known, w.Known), cmp.Compare(v.Order, w.Order), cmp.Compare(v.Number, w.Number)) > 0
}

// element is one value of one version; a NULL value is NaN. Whoever is given one may keep it only during the call.
type element struct {
	point
	from *version // of an aggregate only its series counts
}

// merger combines blocks that arrive ordered by their first valid_time into one ordered sequence of elements. open
// holds, in order, those that a later block may still supersede or precede; spare is room for the next merge.
type merger struct {
	everyRun    bool // only versions of one run supersede each other
	keepAll     bool // keep every version, ordered by valid_time and version
	open, spare []element
}

// compare orders elements; 0 means that one supersedes the other.
func (m *merger) compare(a, b element) int {
	switch {
	case m.keepAll:
		return cmp.Or(cmp.Compare(a.time, b.time), cmp.Compare(a.from.Number, b.from.Number), cmp.Compare(a.end, b.end),
			cmp.Compare(a.from.Known, b.from.Known), cmp.Compare(a.from.Order, b.from.Order))
	case m.everyRun:
		return cmp.Or(comparePoints(a.point, b.point), cmp.Compare(a.from.Order, b.from.Order))
	}
	return comparePoints(a.point, b.point)
}

// add merges a block, sorted and without repetition, into the open elements.
func (m *merger) add(block []element) {
	out, rest := m.spare[:0], m.open
	for _, e := range block {
		for len(rest) > 0 && m.compare(rest[0], e) < 0 {
			out, rest = append(out, rest[0]), rest[1:]
		}
		if len(rest) > 0 && m.compare(rest[0], e) == 0 {
			if rest[0].from.supersedes(e.from) {
				e = rest[0]
			}
			rest = rest[1:]
		}
		out = append(out, e)
	}
	m.open, m.spare = append(out, rest...), m.open
}

// flush emits the open elements before bound, which no later block can touch.
func (m *merger) flush(bound micros, emit func(*element) error) error {
	n, _ := slices.BinarySearchFunc(m.open, bound, func(e element, t micros) int { return cmp.Compare(e.time, t) })
	for i := range m.open[:n] {
		if err := emit(&m.open[i]); err != nil {
			return err
		}
	}
	m.open = append(m.open[:0], m.open[n:]...)
	return nil
}

// The series that are asked for, in order, each once; those that there are not first. Of each the blocks that overlap the
// window, and of each block what lies in it: lo to hi. width_bucket is a binary search, and times are valid_times unpacked
// once for all that looks into them: OFFSET 0 keeps PostgreSQL from unpacking them for each.
// A block spans 768 hours at most, so both bounds on valid_from make a range of the primary key.
const selectBlocks = `
	SELECT s.id, s.key, coalesce(s.series_id::text, ''), coalesce(s.series_key, ''), coalesce(s.unit, ''),
	       coalesce(b.run_id::text, ''), coalesce(b.run_order, 0), coalesce(b.version, 0), b.changed_by, b.annotation, b.tags,
	       array_send(ARRAY[b.known_time, b.change_time, b.valid_from]), array_send(b.times[b.lo:b.hi]),
	       array_send(b.valid_time_ends[b.lo:b.hi]), array_send(b."values"[b.lo:b.hi])
	FROM (
		SELECT DISTINCT ON (s.series_key COLLATE "C") ref.id, ref.key, s.series_id, s.series_key, s.unit
		FROM json_to_recordset($2) AS ref (id text, key text)
		LEFT JOIN LATERAL (
			SELECT * FROM series_table WHERE tenant_id = $1 AND series_id = nullif(ref.id, '')::uuid
			UNION ALL
			SELECT * FROM series_table WHERE tenant_id = $1 AND series_key = ref.key
			UNION ALL
			SELECT * FROM series_table WHERE tenant_id = $1 AND ref.id = '' AND ref.key = ''
		) AS s ON s.inserted_at <= $7
		ORDER BY s.series_key COLLATE "C" NULLS FIRST) AS s
	LEFT JOIN LATERAL (
		SELECT *, width_bucket($3::timestamptz - interval '1 microsecond', times) + 1 AS lo,
		       width_bucket($4::timestamptz - interval '1 microsecond', times) AS hi
		FROM (SELECT *, valid_times || '{}' AS times FROM (
			SELECT * FROM values_table v
			WHERE v.tenant_id = $1 AND v.series_id = s.series_id AND v.valid_to >= $3
			  AND v.valid_from >= $3::timestamptz - interval '768 hours' AND v.valid_from < $4
			  AND v.known_time >= $5 AND v.known_time < $6 AND v.change_time <= $7
			ORDER BY %s) AS v OFFSET 0) AS v OFFSET 0) AS b ON true
	WHERE b.version IS NOT NULL OR s.series_id IS NULL AND s.id || s.key <> ''`

// Read calls emit for each value that q asks for, ordered by series_key, then valid_time (overlapping: known_time, valid_time),
// then version. Memory holds what overlaps, not the result. An unknown series is a 404; an error of emit ends the read.
func (s *store) Read(ctx context.Context, c Caller, q readQuery, emit func(*element) error) error {
	if q.bucket > 0 {
		emit = inBuckets(micros(q.bucket), q.agg, emit)
	}
	if q.series == nil {
		q.series = []seriesRef{{}} // which names all
	}
	query := fmt.Sprintf(selectBlocks, map[bool]string{true: "v.known_time, v.valid_from", false: "v.valid_from"}[q.overlapping])
	// A read that ends early must cancel: closing rows would fetch all that is left of them.
	ctx, cancel := context.WithCancel(ctx)
	rows, err := s.QueryContext(ctx, query, c.tenant, asJSON(q.series), q.start, q.end, q.startKnown, q.endKnown, q.asOf)
	if err != nil {
		cancel()
		return err
	}
	defer rows.Close()
	defer cancel()
	var d blockDecoder
	m := merger{everyRun: q.overlapping, keepAll: q.allVersions}
	last := &version{of: &series{}} // of the row before
	for rows.Next() {
		v, elements, err := d.next(rows, q.lead)
		if err != nil {
			return err
		}
		if *v.of == *last.of {
			v.of = last.of
		}
		bound := lastTime // unless this row goes on with what is being merged: a series, in overlapping mode a known_time of it
		if v.of == last.of && (v.Known == last.Known || !q.overlapping) {
			bound = v.first
		}
		if v.of.Key < last.of.Key || bound < last.first {
			return errors.New("Read: the database answered out of order")
		}
		if err := m.flush(bound, emit); err != nil {
			return err
		}
		m.add(elements)
		last = v
	}
	if err := rows.Err(); err != nil {
		return err
	}
	if err := m.flush(lastTime, emit); err != nil || q.bucket == 0 {
		return err
	}
	return emit(&element{from: &version{of: &series{}}}) // of a series that there is not: it ends the last bucket
}

// blockDecoder turns rows of selectBlocks into elements. Its buffers serve one row after the other.
type blockDecoder struct {
	wire                        [4]sql.RawBytes // known_time, change_time and valid_from; valid_times; ends; values
	stamps, times, ends, values []uint64
	out                         []element
}

// next decodes the row at hand, of its values those that were known lead before their time.
func (d *blockDecoder) next(rows *sql.Rows, lead span) (*version, []element, error) {
	v, ref := &version{of: &series{}}, seriesRef{}
	err := rows.Scan(&ref.ID, &ref.Key, &v.of.ID, &v.of.Key, &v.of.Unit, &v.RunID, &v.Order, &v.Number, &v.ChangedBy, &v.Annotation, &v.Tags,
		&d.wire[0], &d.wire[1], &d.wire[2], &d.wire[3])
	for i, into := range []*[]uint64{&d.stamps, &d.times, &d.ends, &d.values} {
		if err == nil { // a NULL, of ends, gives none
			*into, err = decodeArray((*into)[:0], d.wire[i], []uint64{nullTime, nullTime, nullTime, nullFloat}[i])
		}
	}
	if err == nil && v.of.ID == "" {
		err = noSeries(ref)
	}
	if err != nil {
		return nil, nil, err
	}
	v.Known, v.Change, v.first = micros(d.stamps[0])+pgEpoch, micros(d.stamps[1])+pgEpoch, micros(d.stamps[2])+pgEpoch // #nosec G115 -- bits
	d.out = d.out[:0]
	for i, bits := range d.times { // the table checks that the arrays have one length
		p := point{time: micros(bits) + pgEpoch, value: math.Float64frombits(d.values[i])} // #nosec G115 -- bits
		if p.time-v.Known < micros(lead) {
			continue
		}
		if len(d.ends) > 0 {
			p.end = micros(d.ends[i]) + pgEpoch // #nosec G115 -- bits
		}
		d.out = append(d.out, element{p, v})
	}
	return v, d.out, nil
}

// inBuckets returns an emit that aggregates what it is given in order, NULLs aside, over buckets of a width that are aligned
// to 1970-01-01 UTC. The first element beyond a bucket ends it. A sum that no float64 can hold is a 422: JSON has no infinity.
func inBuckets(width micros, agg label, emit func(*element) error) func(*element) error {
	bucket := element{from: &version{}}
	var n, sum, lo, hi float64
	return func(e *element) error {
		if math.IsNaN(e.value) {
			return nil
		}
		start := e.time - (e.time-unixEpoch%width)%width
		if e.from.of != bucket.from.of || start != bucket.time {
			bucket.value = map[label]float64{"mean": sum / n, "min": lo, "max": hi, "sum": sum, "count": n}[agg]
			if math.IsInf(bucket.value, 0) {
				return invalid("agg: the %s of series %q from %s on is beyond a 64-bit float", agg, bucket.from.of.Key, bucket.time)
			}
			if n > 0 {
				if err := emit(&bucket); err != nil {
					return err
				}
			}
			bucket.from, bucket.time, n, sum, lo, hi = e.from, start, 0, 0, e.value, e.value
		}
		n, sum, lo, hi = n+1, sum+e.value, min(lo, e.value), max(hi, e.value)
		return nil
	}
}

// UpdateValues stores a new version for each update that changes something, all or none, and returns which did; refs: whose.
func (s *store) UpdateValues(ctx context.Context, c Caller, refs []seriesRef, updates []map[string]any) (
	answer json.RawMessage, err error) {
	err = s.inTx(ctx, func(tx *sql.Tx) error {
		found, err := findSeries(ctx, c, tx, refs)
		if err != nil {
			return err
		}
		for i, x := range found {
			updates[i]["series_id"] = x.ID
		}
		return tx.QueryRowContext(ctx, `SELECT correct_values($1, nullif($2, ''), $3) /* of tenant_id $1 */`,
			c.tenant, c.email, asJSON(updates)).Scan(&answer)
	})
	if status := map[string]int{"TD404": 404, "TD422": 422}[sqlState(err)]; status != 0 {
		err = refusal(status, "%s", pq.As(err).Message)
	}
	return answer, err
}

// SeriesByID is the JSON object {series_id: series} of the caller's tenant, by series_key.
func (s *store) SeriesByID(ctx context.Context, c Caller) (answer json.RawMessage, err error) {
	err = s.db.QueryRowContext(ctx, `
		SELECT coalesce(json_object_agg(series_id, json_build_object('series_key', series_key, 'description', description,
		       'unit', unit) ORDER BY series_key COLLATE "C"), '{}')
		FROM series_table WHERE tenant_id = $1`, c.tenant).Scan(&answer)
	return answer, err
}

// Runs is {"count", "data"} of the tenant's runs known in start <= t < end, the newest known first; a workflow of "" is any.
func (s *store) Runs(ctx context.Context, c Caller, workflow label, start, end micros, limit int64) (answer json.RawMessage, err error) {
	err = s.db.QueryRowContext(ctx, `
		SELECT json_build_object('count', count(*), 'data', coalesce(json_agg(r), '[]')) FROM (
			SELECT run_id, workflow_id, iso_time(run_start_time) AS run_start_time, iso_time(run_finish_time) AS run_finish_time,
			       iso_time(known_time) AS known_time, run_params, changed_by, iso_time(inserted_at) AS inserted_at,
			       rows_inserted AS rows
			FROM runs_table t
			WHERE tenant_id = $1 AND ($2 = '' OR workflow_id = $2) AND t.known_time >= $3 AND t.known_time < $4
			ORDER BY t.known_time DESC, run_order DESC LIMIT $5) AS r`, c.tenant, workflow, start, end, limit).Scan(&answer)
	return answer, err
}
